"""Turns the log-probabilities in a server's answers into rows of a sparse teacher.

``api`` asks the server, ``openai``, ``llamacpp``, ``vllm`` and ``sglang`` know the forms of their answers, ``answers``
has the one form into which they are read, ``arrays`` reads numbers, ``tokens`` finds the ids of tokens, and ``rows``
makes rows.
"""
