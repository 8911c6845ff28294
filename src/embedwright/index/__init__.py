"""An index of documents that knows the model that made it: it is built, changed and searched here."""
