"""Kernels in C for the CPU, compiled when the package is installed, and in Triton for CUDA."""
