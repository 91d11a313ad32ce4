"""CUDA C++ of `fp4_scaled_mm`."""
