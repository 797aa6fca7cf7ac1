"""Losses of other trainers on the same rows as ours, judged in float64."""
