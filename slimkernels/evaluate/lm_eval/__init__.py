"""Multiple-choice benchmarks through lm-eval, and the search of this package as one of lm-eval's models."""
