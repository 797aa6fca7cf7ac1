"""Experiments of published papers, reproduced at a size that two CPU cores can run."""
