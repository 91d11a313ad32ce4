"""The CUDA C++ of the Hopper backend of `scaled_mm`."""
