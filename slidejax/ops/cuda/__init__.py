"""The compiled CUDA library: loading it, and its calls."""
