"""Training examples from plain documents, by rules: no queries and no language model are needed."""
