"""Perplexity of a mean cross-entropy."""

import math

# The exponential of a float64 overflows above 709.78.
_LARGEST_LOSS = 700.0


def perplexity(loss: float) -> float:
    """Computes exp(loss), or infinity where it overflows, so that a diverged model is reported and raises nothing.

    Args:
        loss: Mean cross-entropy in nats per token.
    """
    return math.exp(loss) if loss < _LARGEST_LOSS else math.inf
