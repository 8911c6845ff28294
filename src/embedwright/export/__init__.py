"""Models as other runtimes read them."""
