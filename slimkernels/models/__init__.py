"""What every tool needs of a language model: loading it, its head, its batches, its loss, its fingerprints."""
