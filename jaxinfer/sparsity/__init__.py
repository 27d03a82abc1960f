"""Masks that are learned, structure that moves together, and programs that shrink by them."""
