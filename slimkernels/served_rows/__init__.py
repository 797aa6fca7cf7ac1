"""A server's answer as rows of a teacher, for capture and for training."""
