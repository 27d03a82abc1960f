"""What is raised where a program cannot be made smaller."""


class ShrinkError(Exception):
    """A program could not be shrunk, or a shrunk program not be used in this way."""
