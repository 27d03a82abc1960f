"""Laplacians, forward in one pass."""
