"""The language models that a search can run on: one of transformers, or one behind a server."""
