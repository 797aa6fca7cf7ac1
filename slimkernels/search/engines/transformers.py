"""``TransformersEngine``: branches of a causal language model of transformers, one batched forward for each token."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.search.engine import Prompt as PromptText
from slimkernels.search.engine import Step, StepEnd, StepRequest
from slimkernels.search.engines import branch_attention
from slimkernels.search.engines.branch_attention import ROWS, DecodePass, PromptPass
from slimkernels.search.engines.branch_attention import branch_attention as attention_of
from slimkernels.search.engines.branch_cache import Branch, Prompt, Steps, TokenPool
from slimkernels.search.engines.branch_rows import TAIL, Rows


@dataclasses.dataclass
class Memory:
    """Bytes of keys and values.

    Attributes:
        shared_bytes: That the branches hold: prompts, and slots allocated for generated tokens, used or not.
        unshared_bytes: That they would hold if each had a copy of all its own.
    """

    shared_bytes: int = 0
    unshared_bytes: int = 0


class TransformersEngine:
    """A causal language model of transformers, embedded in this process.

    A prompt is encoded once. All branches of all questions advance together, one forward for each token; a branch
    reads on from token ids. Keys and values of a prompt, and of every generated token, exist once however many
    branches share them, and are freed with the last of them. Transient memory: one layer's keys and values of the
    branches that rows continue, a copy for every eight rows of a branch, and of the rows' new tokens once a row has
    ended; (rows, V) logits.

    A row's draw depends on its own logits, seed and position alone, and no sum of the attention over the batch around
    it. Whether its logits are bit-equal in every batch is up to the matrix products: rows are padded to a multiple of
    16, where PyTorch 2.13 gave a row the same result at every batch size tried (up to 512, one AMD processor with
    AVX-512, float32 and bfloat16, one and two threads). PyTorch promises no such thing; ``is_batch_invariant`` tries it
    with this model on this machine. Where it fails, a token can differ if two perturbed scores are within rounding.

    Args:
        model: A causal language model in evaluation mode, whose attention goes through transformers' attention
            interface. Every layer must see the whole past; a sliding window limits the context to its length.
        tokenizer: Its tokenizer.
        eos_token_ids: Tokens that end a text; by default those of the model's generation configuration, and the
            tokenizer's.
        embedding_layer: Whose output steps are embedded by, 0 the input embeddings. Early layers tell a repeated step
            from a new one, late ones hardly: at thresholds that cut 1 % of new steps, SmolLM2-135M finds all of 27
            verbatim repeats by layer 1 or 2, twelve by layer 8, nine by the last (``bench.repetition``).

    Raises:
        ValueError: A model whose forward this engine does not reproduce.
        FloatingPointError: A model that gives NaN.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Iterable[int] | None = None,
        embedding_layer: int = 2,
    ) -> None:
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if embedding_layer < 0:
            raise ValueError(f"embedding_layer must be at least 0, got {embedding_layer}")
        self.model, self.tokenizer, self.embedding_layer = model, tokenizer, min(embedding_layer, layers)
        embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
        self.device, self._vocab_size = embeddings.weight.device, embeddings.num_embeddings
        self.eos_token_ids = frozenset(_eos_token_ids(model, tokenizer) if eos_token_ids is None else eos_token_ids)
        self.context_length = _context_length(model)
        self.peak = Memory()
        self._pool = TokenPool()
        self._branches: dict[int, Branch] = {}
        self._next = 0
        self._check_model()

    def identity(self) -> dict[str, Any]:
        """The model's type, data type and weights (a hash of samples), the end tokens and the embedding layer."""
        return {
            "engine": "transformers",
            "model": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "weights": _sampled_hash(self.model),
            "eos_token_ids": sorted(self.eos_token_ids),
            "embedding_layer": self.embedding_layer,
        }

    def check(self, prompt: PromptText) -> None:
        """Raises ValueError for a prompt without tokens, with unknown tokens, or that fills the context."""
        token_ids = self._encode(prompt)
        if not token_ids:
            raise ValueError("the prompt must have at least one token, got none")
        unknown = [token for token in token_ids if not 0 <= token < self._vocab_size]
        if unknown:
            raise ValueError(f"the prompt's token ids must be in [0, V = {self._vocab_size}), got {unknown[0]}")
        if len(token_ids) >= self.context_length:
            raise ValueError(
                f"the prompt must be shorter than the model's context of {self.context_length} tokens, got "
                f"{len(token_ids)}: shorten it"
            )

    def count_tokens(self, prompt: PromptText) -> int:
        """Tokens of a prompt."""
        return len(self._encode(prompt))

    def cache_bytes(self, prompt_tokens: int, generated_tokens: int) -> int:
        """Of keys and values: the prompts', and those of the slots that so many generated tokens make the pool have."""
        return self._bytes_per_token * (prompt_tokens + TokenPool.capacity(generated_tokens))

    @torch.inference_mode()
    def start(self, prompts: Sequence[PromptText]) -> list[int]:
        """Encodes each prompt by itself; returns the branch that is it."""
        for prompt in prompts:
            self.check(prompt)
        with attention_of(self.model):
            return [self.add(self._read_prompt(self._encode(prompt))) for prompt in prompts]

    @torch.inference_mode()
    def extend(self, requests: Sequence[StepRequest], step_end: StepEnd, *, embed: bool) -> list[Step]:
        """Generates all requests together; each becomes a branch.

        Args:
            requests: Any number, of any branches.
            step_end: Called with a step's text after each of its tokens.
            embed: Whether to pool embeddings: the mean of one layer's hidden states over the step's tokens but the
                last, which has not been read yet (over the token before it, where the step has but one), less their
                mean over the prompt, which all steps have in common.

        Raises:
            FloatingPointError: The model gave NaN, or nothing above -inf.
        """
        for request in requests:
            if self._branches[request.branch].length >= self.context_length:
                raise ValueError(f"branch {request.branch} must be shorter than the context: it cannot be continued")
        self._compact()
        with attention_of(self.model):
            self._read_last_tokens(dict.fromkeys(request.branch for request in requests))
            rows = Rows(self, requests, step_end, embed)
            rows.generate()
        return rows.steps()

    @torch.inference_mode()
    def replay(self, steps: Sequence[Step], *, embed: bool) -> list[Step]:
        """Reads steps that were drawn before, through the same passes as when they were."""
        requests = [StepRequest(step.branch, (), 0, 0, 0.0, 0, 1.0, len(step.token_ids)) for step in steps]
        self._compact()
        with attention_of(self.model):
            self._read_last_tokens(dict.fromkeys(step.branch for step in steps))
            rows = Rows(self, requests, lambda _: False, embed, [list(step.token_ids) for step in steps])
            rows.generate()
        return [
            dataclasses.replace(step, branch=read.branch, embedding=read.embedding)
            for step, read in zip(steps, rows.steps(), strict=True)
        ]

    def free(self, branch: int) -> None:
        """Forgets a branch."""
        self._pool.release(self._branches.pop(branch).slots)

    def memory(self) -> Memory:
        """What the branches hold now; ``peak`` is the most there was during a generation."""
        prompts = {id(branch.prompt): branch.prompt for branch in self._branches.values()}
        return Memory(
            self._pool.num_bytes + sum(prompt.num_bytes for prompt in prompts.values()),
            self._unshared_bytes(self._branches.values()),
        )

    def is_batch_invariant(self, num_rows: int = 64) -> bool:
        """Whether a row's logits are bit-equal alone and beside up to ``num_rows`` others, on this machine."""
        [root] = self.start([self._probe()])
        request = StepRequest(root, (0,), 0, 0, 1.0, 0, 1.0, 3)
        try:
            alone = self._probe_steps([request])[0]
            sizes = sorted({2, 3, 5, ROWS - 1, ROWS, ROWS + 1, num_rows // 2, num_rows})
            return all(
                self._probe_steps([*others[:place], request, *others[place:]])[place] == alone
                for size in sizes
                for others in [[dataclasses.replace(request, seed=seed) for seed in range(1, size)]]
                for place in (0, size - 1)
            )
        finally:
            self.free(root)

    def _probe_steps(self, requests: list[StepRequest]) -> list[tuple[list[int], float, float]]:
        steps = self.extend(requests, lambda _: False, embed=False)
        for step in steps:
            self.free(step.branch)
        return [(list(step.token_ids), step.sum_logprob, step.sum_entropy) for step in steps]

    def _encode(self, prompt: PromptText) -> list[int]:
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else [int(token) for token in prompt]

    def add(self, branch: Branch) -> int:
        """Takes in a branch; returns its number."""
        self._next += 1
        self._branches[self._next] = branch
        return self._next

    def _read_prompt(self, token_ids: list[int]) -> Branch:
        prompt = Prompt(token_ids)
        output = self._forward(PromptPass(prompt), torch.tensor([token_ids], device=self.device), None)
        hidden = output.hidden_states[self.embedding_layer][0].float()
        prompt.mean_hidden = hidden.mean(0)
        self._pool.like(prompt)
        nothing = np.zeros(0, np.int64)
        tail = token_ids[-TAIL:]
        return Branch(prompt, nothing, len(token_ids), tail, None, output.logits[0, -1].clone(), hidden[-1].clone())

    def _compact(self) -> None:
        """Takes back the slots of branches that were freed."""
        numbers = self._pool.compact()
        for branch in self._branches.values():
            branch.slots = numbers[branch.slots]

    def _read_last_tokens(self, numbers: Iterable[int]) -> None:
        """Lets the model read the last token of branches that end in an unread one, once for all their children."""
        found = [self._branches[number] for number in numbers]
        branches = [branch for branch in found if branch.unread is not None]
        tokens = [branch.unread for branch in found if branch.unread is not None]
        if not branches:
            return
        slots = Steps(branches, 1)
        logits, hidden = self.read(branches, slots, np.arange(len(branches)), tokens)
        for row, branch in enumerate(branches):
            branch.slots, branch.unread = slots.of(row), None
            branch.logits, branch.hidden = logits[row].clone(), hidden[row].clone()

    def read(
        self, branches: Sequence[Branch], slots: Steps, rows: np.ndarray, tokens: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """One token more in each row: the logits (R, V) and the embedding layer's (R, D) float32 after it."""
        slots.append(rows, self._pool.allocate(len(rows)))
        prompts = [branch.prompt for branch in branches]
        padding = -len(rows) % ROWS
        positions = [
            len(prompt.token_ids) + length - 1 for prompt, length in zip(prompts, slots.lengths[rows], strict=True)
        ]
        output = self._forward(
            DecodePass(self._pool, prompts, slots, rows, self.device),
            torch.tensor([*tokens, *[0] * padding], device=self.device)[:, None],
            torch.tensor([*positions, *[0] * padding], device=self.device)[:, None],
        )
        return output.logits[: len(rows), -1], output.hidden_states[self.embedding_layer][: len(rows), -1].float()

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
                f"{current.layers_seen} did: search with a server that runs it"
            )
        return output

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def release(self, slots: np.ndarray) -> None:
        """Counts slots once less."""
        self._pool.release(slots)

    def fork(self, number: int) -> Branch:
        """A copy of a branch, which shares its keys and values."""
        branch = self._branches[number]
        self._pool.share(branch.slots)
        return branch

    def note_memory(self, rows: Sequence[Branch], slots: Steps) -> None:
        """Notes the most memory that there was."""
        now = self.memory()
        unshared = now.unshared_bytes + self._unshared_bytes(rows, slots.lengths)
        self.peak.shared_bytes = max(self.peak.shared_bytes, now.shared_bytes)
        self.peak.unshared_bytes = max(self.peak.unshared_bytes, unshared)

    def _unshared_bytes(self, branches: Iterable[Branch], lengths: np.ndarray | None = None) -> int:
        total = 0
        for row, branch in enumerate(branches):
            prompt_tokens = len(branch.prompt.token_ids)
            own = len(branch.slots) if lengths is None else int(lengths[row])
            total += branch.prompt.num_bytes // prompt_tokens * (prompt_tokens + own)
        return total

    def _probe(self) -> list[int]:
        return [(token * 7919 + 13) % self._vocab_size for token in range(min(11, self.context_length - 6))]

    @torch.inference_mode()
    def _check_model(self) -> None:
        """Compares the model's own forward of a few tokens with this engine's, the last of them read one by one."""
        token_ids = self._probe()
        own = self.model(torch.tensor([token_ids], device=self.device), use_cache=False).logits[0, -1].float()
        if own.isnan().any():
            raise FloatingPointError(
                f"the model gives logits that are NaN after {len(token_ids)} tokens: load it in another dtype, or "
                "check its weights"
            )
        with attention_of(self.model):
            branch = self._read_prompt(token_ids[:-2])
            number = self.add(branch)
            for token in token_ids[-2:]:
                branch.unread = token
                branch.length += 1
                self._read_last_tokens([number])
        self._bytes_per_token = branch.prompt.num_bytes // len(branch.prompt.token_ids)
        ours = cast(Tensor, branch.logits).float()
        self.free(number)
        scale = float(own.abs().max())
        tolerance = (1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.1) * max(scale, 1.0)
        if not torch.allclose(ours, own, atol=tolerance, rtol=0.0):
            raise ValueError(
                f"model must see its whole past through plain softmax attention: {type(self.model).__name__} gives "
                f"logits that differ by {float((ours - own).abs().max()):.3g}: search with a server that runs it"
            )


def _sampled_hash(model: PreTrainedModel) -> str:
    """Of the shapes, and of about a thousand elements, of every parameter."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 1000)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    found: set[int] = set()
    given: tuple[Any, ...] = (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id)
    for ids in given:
        found.update([ids] if isinstance(ids, int) else ids or ())
    return found


def _context_length(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    lengths = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "sliding_window")]
    return min((length for length in lengths if length), default=1 << 20)
