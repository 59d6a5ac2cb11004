"""Kernels of every back end, and the choice between them."""
