"""Kernels for NVIDIA GPUs. Importing this package needs Triton; `nha.ops.api` imports it only when it is there."""
