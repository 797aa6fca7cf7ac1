"""The lengths at which a model's forward changes, as its configuration names them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

ROPE_LENGTH = "original_max_position_embeddings"
# Names of settings that are numbers of tokens. Windows of layers, images and sound are none.
_LENGTH = re.compile(r"window|chunk|local_attention|floor|original_max_position|index_topk$|index_block_size")
_NO_LENGTH = re.compile(r"layer|pattern|feed_forward|mamba|conv|image|vision|audio|use_")
_CHANGING = ("longrope", "dynamic")  # scalings of rotary embeddings that depend on the largest position of a batch
# Settings whose product is a number of tokens.
_PRODUCTS = (("index_block_size", "index_topk_blocks"),)


def context_length(config: Any) -> int:
    """Returns the number of tokens that a model can read, in which every layer sees the whole past."""
    names = ("max_position_embeddings", "n_positions", "sliding_window")
    lengths = [getattr(config, name, None) for name in names]
    return min((length for length in lengths if length), default=1 << 20)


def rope_lengths(config: Any) -> tuple[int, ...]:
    """Returns the lengths at which rotary embeddings switch to other frequencies for a whole batch, in order."""
    own = getattr(config, ROPE_LENGTH, None)
    found = {
        parameters.get(ROPE_LENGTH) or own
        for parameters in _mappings(getattr(config, "rope_parameters", None))
        if parameters.get("rope_type") in _CHANGING
    }
    return tuple(sorted(length for length in found if length))


def named_lengths(config: Any) -> dict[str, int]:
    """Returns the settings of a configuration that are numbers of tokens, by name, shortest first."""
    content = config.to_dict()
    found = dict(_lengths(content))
    for names in _PRODUCTS:
        values = [content.get(name) for name in names]
        if all(isinstance(value, int) for value in values):
            found[" * ".join(names)] = values[0] * values[1]
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _lengths(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _lengths(value)
        elif _LENGTH.search(str(name)) and not _NO_LENGTH.search(str(name)):
            values = value if isinstance(value, list | tuple) else [value]
            lengths = [one for one in values if isinstance(one, int) and one > 1]
            if lengths:
                yield str(name), min(lengths)


def _mappings(content: Any) -> Iterator[Mapping[str, Any]]:
    """Yields a mapping and the mappings in it, as a model with several kinds of layers has them."""
    if isinstance(content, Mapping):
        yield content
        for value in content.values():
            yield from _mappings(value)
