"""Proofs that a model is what it says."""
