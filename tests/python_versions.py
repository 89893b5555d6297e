"""The versions of Python that the package supports."""

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
