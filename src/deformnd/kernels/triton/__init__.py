"""The GPU backend: Triton kernels, their launch code and the table of their tile sizes."""
