"""Kernels written in Triton, and where they run."""
