"""The Triton kernels, one pass of attention to a file. Nothing here is imported before the first CUDA call."""
