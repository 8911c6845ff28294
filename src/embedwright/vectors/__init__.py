"""Vectors on disk and exact search over them."""
