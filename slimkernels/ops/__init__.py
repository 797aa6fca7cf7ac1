"""The operators, one module each. Importing this package registers all of them with torch."""

from slimkernels.ops import (  # noqa: F401 -- each module registers its operators
    decode_logits,
    gather_logits,
    linear_gather_logits,
    linear_slim_loss,
    linear_topk_logits,
    mixed_targets,
    sample_logits,
    sample_targets,
    slim_loss,
    sparse_softmax,
    topk_logits,
)
