"""Faster forms of stock blocks for CPUs, and the C and oneDNN products that they and the search run on.

`accelerate.accelerate(network)` and the context `accelerate.stock(network)` are the one seam between stock and fast.
"""
