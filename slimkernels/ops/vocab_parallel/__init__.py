"""The losses ``slim_loss`` and ``linear_slim_loss`` where every rank holds a slice of the vocabulary."""
