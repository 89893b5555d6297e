"""Resources and instructions of the compiled kernels, without a GPU: see __main__.py."""
