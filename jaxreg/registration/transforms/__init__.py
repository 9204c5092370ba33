"""Transforms between two spaces, and what kernels do with them."""
