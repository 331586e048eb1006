"""Measuring the engine: workloads, what the hardware allows, and what other engines reach on the same work."""
