"""Multiple-choice benchmarks through lm-eval, and this package's search as one of its models."""
