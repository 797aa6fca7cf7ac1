"""Turns the log-probabilities in a server's answers into rows of a sparse teacher.

``api`` asks the server and reads its answers, ``tokens`` finds the ids of the tokens in them, and ``rows`` makes rows.
"""
