"""Training data that a language model writes or judges."""
