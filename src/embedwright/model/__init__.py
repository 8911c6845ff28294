"""The packed bidirectional encoder, its poolings, and the Embedder that holds them.

Importing this package makes our model type known to transformers, so that `AutoModel` and sentence-transformers open
our folders.
"""

from embedwright.model.interop import tokenizer as tokenizer
