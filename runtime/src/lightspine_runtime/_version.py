"""The version, the same as lightspine's; the build reads it from here."""

__version__ = "0.1.0"
