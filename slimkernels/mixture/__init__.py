"""Rows that several sources keep of the same positions, joined: their ids, and their distributions."""
