"""Faster forms of stock blocks for CPUs, with the C kernels and oneDNN products that they and the search run on.

`accelerate.accelerate(network)` puts the faster forms in. The context `accelerate.stock(network)` runs without them.
"""
