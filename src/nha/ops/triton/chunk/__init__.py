"""The chunked kernels, by phase."""
