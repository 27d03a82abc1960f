"""What was found, as data that prints: explain tables and comparisons of compiled programs.

This room touches results only: strings, numbers and dataclasses.
"""
