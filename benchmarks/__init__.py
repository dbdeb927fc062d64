"""Benchmarks of kernels, training steps and data loading, behind `fastvit bench`."""
