"""Domains and measures that only look at graphs."""
