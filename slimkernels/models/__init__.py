"""Language models as all tools see them: loading, head, batches, loss, held-out scores and fingerprints."""
