"""Embedwright: decoder-only LLMs as generalist text-embedding models."""

__version__ = "0.1.0"
