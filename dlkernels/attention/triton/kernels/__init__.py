"""The Triton kernels, with a file for each pass of attention. Nothing here is imported before the first CUDA call."""
