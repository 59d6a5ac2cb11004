"""The kernels of csrc/cuda, compiled by g++ and run on the CPU: each CUDA thread is a fibre."""
