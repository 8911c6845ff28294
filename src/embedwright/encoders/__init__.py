"""Whatever turns texts into vectors: our models, sentence-transformers, a server, a user's own object."""
