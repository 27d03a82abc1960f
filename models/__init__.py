"""Flax Linen models, one family per file, and the registry that loads them (`jaxinfer.models.zoo`).

Importing this package imports nothing else: Flax comes with the family that is asked for.
"""
