"""Kernels of the engine. Depends on JAX alone; one folder an operation."""
