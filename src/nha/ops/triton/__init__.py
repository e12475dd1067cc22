"""Kernels for NVIDIA GPUs. Importing this package needs Triton; `nha.ops` imports it only where Triton is installed."""
