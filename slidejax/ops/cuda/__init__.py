"""The compiled CUDA library: loading it, and calling it."""
