"""Benchmarks: the public ops beside what one would use without them."""
