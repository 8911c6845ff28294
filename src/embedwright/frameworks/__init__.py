"""A model as the embeddings of an application framework, queries and documents each on their own side."""
