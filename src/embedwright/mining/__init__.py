"""Hard negatives: the pool of documents, the rules of NV-Retriever, and the report."""
