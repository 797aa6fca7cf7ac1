"""``BranchModel``: a causal language model of transformers that reads each prompt and token once for all branches.

It knows nothing of sampling: ``draw_steps`` draws the tokens that it reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.search.engines import branch_attention
from slimkernels.search.engines.branch_attention import ROWS, DecodePass, PromptPass
from slimkernels.search.engines.branch_cache import Branch, Prompt, RowSlots, TokenPool
from slimkernels.search.engines.branch_lengths import ROPE_LENGTH, context_length, named_lengths, rope_lengths

_MAX_PROBED = 256  # a length of at most so many tokens is tried; at a longer one the context ends
# Errors of a forward that needs what our attention does not give, such as a mask.
_FORWARD_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError)
_REFUSED = "serve the model and use ServerEngine"
_MIN_TAIL = 8  # tokens before a step to decode with it, for tokenizers whose text depends on the tokens before


@dataclasses.dataclass
class Memory:
    """Bytes of keys and values.

    Attributes:
        shared_bytes: Bytes held for the branches: prompts, and slots allocated for generated tokens, used or not.
        unshared_bytes: Bytes that the branches would take if each had a copy of everything it reads.
    """

    shared_bytes: int = 0
    unshared_bytes: int = 0


class BranchModel:
    """A language model and its branches, which are known by numbers.

    Args:
        model: A causal language model; see ``TransformersEngine``.
        tokenizer: Tokenizer of the model.
        embedding_layer: Layer whose hidden states ``read`` returns, 0 for the input embeddings.

    Attributes:
        pool: Keys and values of generated tokens.
        branches: Branches by number.
        device: Device of the input embeddings.
        vocab_size: Number of input embeddings.
        context_length: Largest number of tokens that the model can read.
        rope_lengths: Lengths at which the model's rotary embeddings switch to other frequencies, in order.
        peak: Most memory in use at the end of any generation.

    Raises:
        ValueError: The model's own forward gives other logits than this class.
        FloatingPointError: The model returned NaN.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, embedding_layer: int) -> None:
        embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
        self.model, self.tokenizer, self.embedding_layer = model, tokenizer, embedding_layer
        self.device, self.vocab_size = embeddings.weight.device, embeddings.num_embeddings
        config = model.config.get_text_config(decoder=True)
        self.context_length = context_length(config)
        # Rows on different sides of these lengths are read in different forwards.
        self.rope_lengths = rope_lengths(config)
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        self._byte_tokens = {token for name, token in tokenizer.get_vocab().items() if name in names}
        self.pool = TokenPool()
        self.branches: dict[int, Branch] = {}
        self.peak = Memory()
        self._last_number = 0
        self._bytes_per_token = self._check_forward()
        self._check_lengths(named_lengths(config))

    def attending(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which the model's attention is that of branches; ``read`` needs it."""
        return branch_attention.installed(self.model)

    @torch.inference_mode()
    def read_prompt(self, token_ids: list[int]) -> int:
        """Encodes a prompt. Returns the number of the branch that ends with it."""
        prompt = Prompt(token_ids)
        output = self._forward(PromptPass(prompt), torch.tensor([token_ids], device=self.device), None)
        hidden = output.hidden_states[self.embedding_layer][0].float()
        prompt.mean_hidden = hidden.mean(0)
        self.pool.match(prompt)
        return self.add(
            Branch(
                prompt,
                slots=np.zeros(0, np.int64),
                length=len(token_ids),
                tail=self.tail(token_ids),
                unread=None,
                logits=output.logits[0, -1].clone(),
                hidden=hidden[-1].clone(),
            )
        )

    def fork(self, numbers: Sequence[int]) -> list[Branch]:
        """Prepares branches to be continued, one row each.

        Reads the last token of every branch that ends with an unread one, once however many rows continue the branch.

        Args:
            numbers: Number of the branch of each row; repeated for sibling rows.

        Returns:
            The branch of each row. Every row shares the slots of its branch, and must ``release`` them or ``add`` a
            branch that has them.
        """
        self._compact()
        self._read_last_tokens(dict.fromkeys(numbers))
        branches = [self.branches[number] for number in numbers]
        for branch in branches:
            self.pool.share(branch.slots)
        return branches

    def read(
        self, branches: Sequence[Branch], slots: RowSlots, rows: np.ndarray, tokens: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Reads one more token in each row.

        Args:
            branches: Branch that each of ``rows`` continues.
            slots: Slots of all rows; those of the new tokens are added.
            rows: (R,) int64, rows that read a token.
            tokens: R token ids.

        Returns:
            The logits (R, V) after the tokens, and the embedding layer's hidden states (R, D) float32 at them.
        """
        lengths = np.array([len(branch.prompt.token_ids) for branch in branches]) + slots.lengths[rows] + 1
        sides = np.searchsorted(self.rope_lengths, lengths)
        parts = [np.flatnonzero(sides == side) for side in np.unique(sides)]
        if len(parts) == 1:
            return self._read_together(branches, slots, rows, tokens)
        read = [
            self._read_together(
                [branches[i] for i in part.tolist()], slots, rows[part], [tokens[i] for i in part.tolist()]
            )
            for part in parts
        ]
        order = torch.from_numpy(np.argsort(np.concatenate(parts))).to(self.device)
        logits, hidden = (torch.cat(both).index_select(0, order) for both in zip(*read, strict=True))
        return logits, hidden

    def _read_together(
        self, branches: Sequence[Branch], slots: RowSlots, rows: np.ndarray, tokens: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Reads one more token in each row, in one forward; see ``read``."""
        slots.append(rows, self.pool.allocate(len(rows)))
        prompts = [branch.prompt for branch in branches]
        padding = -len(rows) % ROWS
        positions = [
            len(prompt.token_ids) + length - 1 for prompt, length in zip(prompts, slots.lengths[rows], strict=True)
        ]
        output = self._forward(
            DecodePass(self.pool, prompts, slots, rows, self.device),
            torch.tensor([*tokens, *[0] * padding], device=self.device)[:, None],
            torch.tensor([*positions, *[0] * padding], device=self.device)[:, None],
        )
        return output.logits[: len(rows), -1], output.hidden_states[self.embedding_layer][: len(rows), -1].float()

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Returns the text of tokens, special tokens only if ``special``."""
        text = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return cast(str, text)

    def tail(self, token_ids: Sequence[int]) -> list[int]:
        """Returns the last tokens, at least eight, that the text of a following step depends on.

        They begin neither inside a character nor inside a run of byte tokens, where a single wrong byte makes all
        others invalid.
        """
        length = _MIN_TAIL
        while length < len(token_ids) and (
            {token_ids[-length], token_ids[-length - 1]} <= self._byte_tokens
            or self.decode(token_ids[-length:]).startswith("\ufffd")
        ):
            length += 1
        return list(token_ids[-length:])

    def add(self, branch: Branch) -> int:
        """Adds a branch. Returns its number."""
        self._last_number += 1
        self.branches[self._last_number] = branch
        return self._last_number

    def free(self, number: int) -> None:
        """Removes a branch; keys and values that other branches share remain."""
        self.release(self.branches.pop(number).slots)

    def release(self, slots: np.ndarray) -> None:
        """Gives up a row's share of slots."""
        self.pool.release(slots)

    def memory(self) -> Memory:
        """Returns the bytes that the branches take now."""
        prompts = {id(branch.prompt): branch.prompt for branch in self.branches.values()}
        return Memory(
            self.pool.num_bytes + sum(prompt.num_bytes for prompt in prompts.values()),
            _unshared_bytes(self.branches.values()),
        )

    def max_bytes(self, prompt_tokens: int, generated_tokens: int) -> int:
        """Returns the most bytes that so many tokens, each stored once, take, free slots of the pool included."""
        return self._bytes_per_token * (prompt_tokens + TokenPool.max_slots(generated_tokens))

    def record_peak(self, branches: Sequence[Branch], slots: RowSlots) -> None:
        """Updates ``peak`` with the memory in use now, that of rows which are not yet branches included."""
        now = self.memory()
        unshared = now.unshared_bytes + _unshared_bytes(branches, slots.lengths)
        self.peak.shared_bytes = max(self.peak.shared_bytes, now.shared_bytes)
        self.peak.unshared_bytes = max(self.peak.unshared_bytes, unshared)

    def probe_tokens(self, length: int = 11) -> list[int]:
        """Returns a prompt of arbitrary tokens for checks of the model, which leaves room for six more."""
        return [(token * 7919 + 13) % self.vocab_size for token in range(min(length, self.context_length - 6))]

    def _compact(self) -> None:
        """Reclaims the slots of branches that were freed."""
        new_slots = self.pool.compact()
        for branch in self.branches.values():
            branch.slots = new_slots[branch.slots]

    def _read_last_tokens(self, numbers: Iterable[int]) -> None:
        """Reads the last token of those branches that end with an unread one."""
        found = [self.branches[number] for number in numbers]
        branches = [branch for branch in found if branch.unread is not None]
        tokens = [branch.unread for branch in found if branch.unread is not None]
        if not branches:
            return
        slots = RowSlots(branches, 1)
        logits, hidden = self.read(branches, slots, np.arange(len(branches)), tokens)
        for row, branch in enumerate(branches):
            branch.slots, branch.unread = slots.of(row), None
            branch.logits, branch.hidden = logits[row].clone(), hidden[row].clone()

    def _forward(self, current: branch_attention.Pass, input_ids: Tensor, position_ids: Tensor | None) -> Any:
        with branch_attention.running(current):
            output = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                output_hidden_states=True,
                logits_to_keep=1,
            )
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        if current.layers_seen != layers:
            raise ValueError(
                f"model must send the attention of all its {layers} layers through transformers' attention interface, "
                f"{current.layers_seen} did: {_REFUSED}"
            )
        return output

    @torch.inference_mode()
    def _check_forward(self) -> int:
        """Compares the model's own forward of a few tokens with ours, which reads the last two one at a time.

        Returns:
            The bytes of one token's keys and values.
        """
        token_ids = self.probe_tokens()
        own = self.model(torch.tensor([token_ids], device=self.device), use_cache=False).logits[0, -1].float()
        if own.isnan().any():
            raise FloatingPointError(
                f"the model gives logits that are NaN after {len(token_ids)} tokens: load it in another dtype, or "
                "check its weights"
            )
        try:
            ours, bytes_per_token = self._read_probe(token_ids, 2)
        except torch.OutOfMemoryError:
            raise
        except _FORWARD_ERRORS as error:
            raise ValueError(
                "model must attend to the whole past by plain softmax attention, but the forward of "
                f"{type(self.model).__name__} needs more than that ({type(error).__name__}: {error}): {_REFUSED}"
            ) from error
        if not self._agree(ours, own):
            raise ValueError(
                "model must attend to the whole past by plain softmax attention, but the logits of "
                f"{type(self.model).__name__} differ by {float((ours - own).abs().max()):.3g}: {_REFUSED}"
            )
        return bytes_per_token

    @torch.inference_mode()
    def _check_lengths(self, lengths: Mapping[str, int]) -> None:
        """Ends the context at the first length past which the model is not reproduced, or which is too long to try."""
        for name, length in lengths.items():
            if length >= self.context_length or (name == ROPE_LENGTH and length > _MAX_PROBED):
                continue
            if length > _MAX_PROBED or not self._is_reproduced(length):
                self.context_length = length

    def _is_reproduced(self, length: int) -> bool:
        """Returns whether our logits are the model's, for a prompt past a length and for a branch that crosses it."""
        token_ids = [(token * 7919 + 13) % self.vocab_size for token in range(min(length + 4, self.context_length))]
        inputs = torch.tensor([token_ids], device=self.device)
        try:
            prompt = self.model(inputs, use_cache=False).logits[0, -1].float()
            cache_name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
            branch = self.model(inputs[:, : length - 1], use_cache=True)
            for token in inputs[:, length - 1 :].T:
                branch = self.model(token[None], use_cache=True, **{cache_name: branch[cache_name]})
            return self._agree(self._read_probe(token_ids, 1)[0], prompt) and self._agree(
                self._read_probe(token_ids, len(token_ids) - length + 1)[0], branch.logits[0, -1].float()
            )
        except torch.OutOfMemoryError:
            raise
        except (*_FORWARD_ERRORS, ValueError):
            return False

    def _read_probe(self, token_ids: list[int], num_read: int) -> tuple[Tensor, int]:
        """Reads tokens, the last ``num_read`` one at a time. Returns the last logits (V,) and the bytes of a token."""
        with self.attending():
            number = self.read_prompt(token_ids[:-num_read])
            branch = self.branches[number]
            try:
                for token in token_ids[-num_read:]:
                    branch.unread = token
                    branch.length += 1
                    self._read_last_tokens([number])
            finally:
                self.free(number)
        return cast(Tensor, branch.logits).float(), branch.prompt.num_bytes // len(branch.prompt.token_ids)

    def _agree(self, ours: Tensor, own: Tensor) -> bool:
        scale = float(own.abs().max())
        tolerance = (1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.1) * max(scale, 1.0)
        return torch.allclose(ours, own, atol=tolerance, rtol=0.0)


def _unshared_bytes(branches: Iterable[Branch], lengths: np.ndarray | None = None) -> int:
    """Returns the bytes of branches with nothing shared; ``lengths`` replaces their numbers of generated tokens."""
    total = 0
    for row, branch in enumerate(branches):
        prompt_tokens = len(branch.prompt.token_ids)
        generated_tokens = len(branch.slots) if lengths is None else int(lengths[row])
        total += branch.prompt.num_bytes // prompt_tokens * (prompt_tokens + generated_tokens)
    return total
