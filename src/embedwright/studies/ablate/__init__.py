"""Ablations: arms of one recipe with seeds, each cell a run of its own, compared with a baseline."""
