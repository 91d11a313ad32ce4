"""CUDA C++ of `quantize_rows`."""
