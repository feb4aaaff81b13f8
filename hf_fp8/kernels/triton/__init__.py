"""Kernels in Triton, and the check on which devices they run."""
