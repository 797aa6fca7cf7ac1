"""The file ``head.safetensors`` of a store of hidden states: the teacher's head, which makes their rows (FORMAT.md)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimkernels.durable import replaced_atomically, write_durably
from slimkernels.packed_logits import HeadWeights
from slimkernels.store.errors import HeadError
from slimkernels.store.format import FORMAT, HEAD_NAME, HiddenSettings, new_digest

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_VERSION = 1
_READ_BYTES = 1 << 24
# Heads by checksum and device. A training reads one; a second is that of another store, such as a held-out one.
_MAX_HEADS = 2
_heads: dict[tuple[str, str], HeadWeights] = {}


def head_settings(head: HeadWeights, top_k: int) -> HiddenSettings:
    """Returns the settings of a store of a teacher's hidden states.

    Raises:
        ValueError: The head is not one that a store can hold.
    """
    _check(head)
    size, checksum = _sealed(_chunks(head))
    return HiddenSettings(hidden_size=head.weight.shape[1], top_k=top_k, head_bytes=size, head_checksum=checksum)


def write_head(path: Path, head: HeadWeights) -> None:
    """Writes a head into the directory of a store, whole or not at all."""
    with replaced_atomically(path / HEAD_NAME) as temporary:
        write_durably(temporary, _chunks(head))


@dataclasses.dataclass(frozen=True)
class StoredHead:
    """The head in the directory of a store; equal to every other head of the same bytes.

    Attributes:
        checksum: Checksum of the file in the manifest.
        size: Size of the file in bytes, in the manifest.
        shape: (V, D), the shape of the weight.
        path: Directory of the store.
    """

    checksum: str
    size: int
    shape: tuple[int, int]
    path: Path = dataclasses.field(compare=False)

    @classmethod
    def of(cls, hidden: HiddenSettings, vocab_size: int, path: Path) -> StoredHead:
        """Returns the head of a store of hidden states in a directory."""
        return cls(hidden.head_checksum, hidden.head_bytes, (vocab_size, hidden.hidden_size), path)

    def on(self, device: torch.device) -> HeadWeights:
        """Returns the head on a device. It is checked when it is first read, and then stays there.

        Raises:
            HeadError: The file is missing, or its bytes are not those that were written.
        """
        key = (self.checksum, str(device))
        if key not in _heads:
            head = self.read()
            moved = [None if tensor is None else tensor.to(device) for tensor in head[:2]]
            while len(_heads) >= _MAX_HEADS:
                _heads.pop(next(iter(_heads)), None)
            _heads[key] = HeadWeights(moved[0], moved[1], *head[2:])  # pyright: ignore[reportArgumentType]
        return _heads[key]

    def read(self) -> HeadWeights:
        """Reads the head from the file, after checking it.

        Raises:
            HeadError: The file is missing, its bytes are not those that were written, or it holds no head of V tokens.
        """
        try:
            with open(self.path / HEAD_NAME, "rb") as file:
                found = _sealed(iter(lambda: file.read(_READ_BYTES), b""))
        except OSError as error:
            raise HeadError(
                f"cannot be read ({error.strerror}): put it back, or capture again", file=HEAD_NAME
            ) from error
        if found != (self.size, self.checksum):
            raise HeadError("its bytes are not those that were written: capture again", file=HEAD_NAME)
        try:
            with safe_open(self.path / HEAD_NAME, framework="pt") as file:
                metadata, names = file.metadata() or {}, set(file.keys())
                weight = file.get_tensor("weight")
                bias = file.get_tensor("bias") if "bias" in names else None
            softcap = float(metadata["softcap"]) if "softcap" in metadata else None
            head = HeadWeights(weight, bias, softcap, float(metadata["logit_scale"]))
            _check(head)
        except (SafetensorError, KeyError, ValueError) as error:
            raise HeadError(f"is not the head of a teacher ({error}): capture again", file=HEAD_NAME) from error
        if tuple(weight.shape) != self.shape:
            raise HeadError(
                f"must hold a weight of shape {self.shape}, got {tuple(weight.shape)}: capture again", file=HEAD_NAME
            )
        return head


def _check(head: HeadWeights) -> None:
    weight, bias = head.weight, head.bias
    if weight.ndim != 2 or weight.dtype not in _DTYPES or 0 in weight.shape:
        raise ValueError(
            f"head.weight must have shape (V, D) and dtype float32, bfloat16 or float16, got {tuple(weight.shape)} "
            f"{weight.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"head.bias must have shape ({len(weight)},) and dtype {weight.dtype} like head.weight, got "
            f"{tuple(bias.shape)} {bias.dtype}"
        )
    for name in ("softcap", "logit_scale"):
        value = getattr(head, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"head.{name} must be positive and finite, got {value!r}")


def _sealed(chunks: Iterable[Any]) -> tuple[int, str]:
    """Returns the number of bytes of a file and their checksum."""
    size, digest = 0, new_digest()
    for chunk in chunks:
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def _chunks(head: HeadWeights) -> Iterator[Any]:
    """Yields the bytes of the file, which the head determines."""
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    metadata = {"format": f"{FORMAT}-head", "version": str(_VERSION), "logit_scale": repr(float(head.logit_scale))}
    if head.softcap is not None:
        metadata["softcap"] = repr(float(head.softcap))
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        start, offset = offset, offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, offset],
        }
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield from _bytes_of(tensor)


def _bytes_of(tensor: Tensor) -> Iterator[Any]:
    """Yields the bytes of a tensor, a part at a time, so that a large one is never copied as a whole."""
    flat = tensor.detach().reshape(-1)
    step = _READ_BYTES // tensor.element_size()
    for part in flat.split(step):
        yield part.to("cpu").contiguous().view(torch.uint8).numpy().data
