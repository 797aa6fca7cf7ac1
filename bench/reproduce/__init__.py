"""The experiments of the papers, repeated at a size that two CPU cores can do."""
