"""Language models that a search can run on: a transformers model in this process, or a model behind a server."""
