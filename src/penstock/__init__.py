"""Penstock: isolated sandboxes on Linux that never leak, never lose work and never drop a request."""

__version__ = "0.1.0"
