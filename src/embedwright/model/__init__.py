"""The packed bidirectional encoder, its poolings, and the Embedder that holds them."""
