"""Encoding a corpus and searching it."""
