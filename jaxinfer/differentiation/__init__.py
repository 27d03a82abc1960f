"""Symbolic differentiation of graphs, by tables of rules."""
