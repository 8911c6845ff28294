"""How other libraries open our models."""
