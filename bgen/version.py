"""The version of bgen."""

__version__ = "0.1.0"
