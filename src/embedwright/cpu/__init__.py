"""Faster forms of stock blocks for CPUs, and the C and oneDNN products that they and the search run on."""
