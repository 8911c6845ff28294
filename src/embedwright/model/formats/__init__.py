"""Anything on disk, as a model: what a folder holds is checked here before it is believed."""
