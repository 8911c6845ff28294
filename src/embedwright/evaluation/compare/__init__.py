"""Comparison of results: one reader for all of them, intervals, tables and pictures."""
