"""Operators that are Triton kernels on GPUs, each with the plain form that runs elsewhere and that it is tested by."""
