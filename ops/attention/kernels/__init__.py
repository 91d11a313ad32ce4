"""The kernels of `attention`: Triton's, which need it to be imported, and CUDA C++ sources."""
