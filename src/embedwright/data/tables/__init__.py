"""Examples and documents as tables on disk: converted once, read in bounded memory, written."""
