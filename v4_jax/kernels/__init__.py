"""Pallas kernels for TPUs, each beside the plain JAX code that defines its numbers."""
