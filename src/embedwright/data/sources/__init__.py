"""Public training sets, and how their rows become examples."""
