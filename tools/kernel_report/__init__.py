"""What the compiled kernels hold, without a GPU: see __main__.py."""
