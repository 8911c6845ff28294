"""Compression: a model made smaller step by step, and one evaluator of all steps."""
