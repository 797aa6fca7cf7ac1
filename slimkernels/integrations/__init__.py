"""Trainers of other projects with the losses and teachers of this package; each module needs its project installed."""
