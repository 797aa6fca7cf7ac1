"""``TransformersEngine``: a search on a causal language model of transformers in this process.

The modules in call order: ``draw_steps`` draws tokens; ``branch_model`` reads them; ``branch_attention`` computes their
attention to the shared keys and values that ``branch_cache`` stores.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.models.fingerprints import trace_weights_fingerprint
from slimkernels.search.engine import Prompt, Step, StepEnd, StepRequest
from slimkernels.search.engines.branch_attention import ROWS
from slimkernels.search.engines.branch_model import BranchModel, Memory
from slimkernels.search.engines.draw_steps import draw_steps, replay_steps


class TransformersEngine:
    """A causal language model of transformers in this process.

    Each prompt is encoded once. All branches of all questions advance together, one forward per token, and continue
    from token ids. Keys and values of a prompt and of every generated token are stored once, however many branches
    share them, and are freed with the last of these branches. Transient memory: one layer's keys and values of the
    branches that rows continue, copied for every eight rows of a branch; those of the rows' new tokens once a row has
    ended; (rows, V) logits.

    A row's draw depends only on its own logits, seed and position, and no sum in the attention depends on the other
    rows of the batch. Whether a row's logits are bit-equal in every batch depends on the matrix products: rows are
    padded to a multiple of 16, where PyTorch 2.13 gave a row the same result at every batch size tried (up to 512, one
    AMD processor with AVX-512, float32 and bfloat16, one and two threads). PyTorch does not guarantee it;
    ``is_batch_invariant`` tests it for this model on this machine. Where it fails, a token can differ if two perturbed
    scores are within rounding.

    Args:
        model: A causal language model in evaluation mode, whose attention goes through transformers' attention
            interface. Every layer must see the whole past: the context ends at the first length that the configuration
            names (a sliding window, a chunk of the attention, an indexer's top-k) past which this engine does not
            reproduce the model; lengths above 256 are not tried.
        tokenizer: Tokenizer of the model.
        eos_token_ids: Tokens that end a text; by default those of the model's generation configuration and of the
            tokenizer.
        embedding_layer: Layer whose output embeds steps, 0 for the input embeddings. Early layers distinguish a
            repeated step from a new one better than late layers: at thresholds that cut 1 % of new steps,
            SmolLM2-135M finds all of 27 verbatim repeats by layer 1 or 2, twelve by layer 8, nine by the last
            (``bench.repetition``).

    Attributes:
        special_ends: Texts with special tokens in them that end a text; see ``ending_at``.
        peak: Most ``Memory`` in use at the end of any generation.

    Raises:
        ValueError: This engine does not reproduce the model's own forward.
        FloatingPointError: The model returned NaN.
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
        self.eos_token_ids = frozenset(_eos_token_ids(model, tokenizer) if eos_token_ids is None else eos_token_ids)
        self.special_ends: tuple[str, ...] = ()
        self._branch_model = BranchModel(model, tokenizer, self.embedding_layer)
        self.device, self.context_length = self._branch_model.device, self._branch_model.context_length
        self.peak = self._branch_model.peak

    def ending_at(self, texts: Iterable[str]) -> TransformersEngine:
        """Returns this engine with further ends of text, those of ``texts`` that have special tokens in them.

        Special tokens are not in the text of a step, so that its caller cannot find them there. The returned engine
        shares the model and the branches with this one.
        """
        other = copy.copy(self)
        other.special_ends = tuple(text for text in texts if self._has_special_tokens(text))
        return other

    def identity(self) -> dict[str, Any]:
        """Returns the model's type, dtype and weights (a hash of samples), the end tokens and the embedding layer."""
        return {
            "engine": "transformers",
            "model": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "weights": trace_weights_fingerprint(self.model),
            "eos_token_ids": sorted(self.eos_token_ids),
            "embedding_layer": self.embedding_layer,
        }

    def chat_prompt(self, question: str) -> list[int] | None:
        """Returns the token ids that ask a question in the model's chat template.

        Returns None if there is no template, or if the text has special tokens, as one that is in a template already.
        """
        if not getattr(self.tokenizer, "chat_template", None) or self._has_special_tokens(question):
            return None
        messages = [{"role": "user", "content": question}]
        token_ids: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return token_ids

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt without tokens, with unknown tokens, or that fills the context."""
        token_ids = self._encode(prompt)
        if not token_ids:
            raise ValueError("the prompt must have at least one token, got none")
        vocab_size = self._branch_model.vocab_size
        unknown = [token for token in token_ids if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(f"the prompt's token ids must be in [0, V = {vocab_size}), got {unknown[0]}")
        if len(token_ids) >= self.context_length:
            raise ValueError(
                f"the prompt must be shorter than the model's context of {self.context_length} tokens, got "
                f"{len(token_ids)}: shorten it"
            )

    def count_tokens(self, prompt: Prompt) -> int:
        """Returns the number of tokens of a prompt."""
        return len(self._encode(prompt))

    def cache_bytes(self, prompt_tokens: int, generated_tokens: int) -> int:
        """Returns the most bytes of keys and values of prompts and generated tokens, free slots included."""
        return self._branch_model.max_bytes(prompt_tokens, generated_tokens)

    def start(self, prompts: Sequence[Prompt]) -> list[int]:
        """Encodes each prompt in a forward of its own. Returns the branch that ends with it."""
        for prompt in prompts:
            self.check(prompt)
        with self._branch_model.attending():
            return [self._branch_model.read_prompt(self._encode(prompt)) for prompt in prompts]

    def extend(self, requests: Sequence[StepRequest], step_end: StepEnd, *, embed: bool) -> list[Step]:
        """Generates a step for each request, all in one batch. Each step becomes a branch.

        Args:
            requests: Any number of steps, of any branches.
            step_end: Function called with a step's text after each of its tokens; True ends the step.
            embed: Whether to compute embeddings: the mean of one layer's hidden states over the step's tokens except
                the last, which the model has not read yet (over the token before the step, if the step has only one),
                minus their mean over the prompt, which all steps have in common.

        Raises:
            FloatingPointError: The model returned NaN, or no logit above -inf.
        """
        for request in requests:
            if self._branch_model.branches[request.branch].length >= self.context_length:
                raise ValueError(f"branch {request.branch} must be shorter than the context: it cannot be continued")
        return draw_steps(
            self._branch_model,
            requests,
            step_end,
            eos_token_ids=self.eos_token_ids,
            special_ends=self.special_ends,
            embed=embed,
        )

    def replay(self, steps: Sequence[Step], *, embed: bool) -> list[Step]:
        """Reads steps that were drawn before, through the same forwards as when they were drawn."""
        return replay_steps(self._branch_model, steps, embed=embed)

    def free(self, branch: int) -> None:
        """Frees a branch."""
        self._branch_model.free(branch)

    def memory(self) -> Memory:
        """Returns the bytes that the branches take now."""
        return self._branch_model.memory()

    def is_batch_invariant(self, num_rows: int = 64) -> bool:
        """Returns whether a row's logits are bit-equal alone and in batches of up to ``num_rows``, on this machine.

        The other rows of the batches continue the same short prompt and longer ones, also longer than the lengths at
        which the model's rotary embeddings switch to other frequencies.
        """
        model = self._branch_model
        roots = self.start([model.probe_tokens(11 + more) for more in (0, 13, *model.rope_lengths)])
        request = StepRequest(roots[0], (0,), 0, 0, 1.0, 0, 1.0, 3)
        try:
            alone = self._probe([request])[0]
            sizes = sorted({2, 3, 5, ROWS - 1, ROWS, ROWS + 1, num_rows // 2, num_rows})
            return all(
                self._probe([*others[:row], request, *others[row:]])[row] == alone
                for size in sizes
                for others in [
                    [
                        dataclasses.replace(request, seed=seed, branch=roots[seed % len(roots)])
                        for seed in range(1, size)
                    ]
                ]
                for row in (0, size - 1)
            )
        finally:
            for root in roots:
                self.free(root)

    def _probe(self, requests: list[StepRequest]) -> list[tuple[list[int], float, float]]:
        """Generates steps and frees them. Returns their tokens, log-probabilities and entropies."""
        steps = self.extend(requests, lambda _: False, embed=False)
        for step in steps:
            self.free(step.branch)
        return [(list(step.token_ids), step.sum_logprob, step.sum_entropy) for step in steps]

    def _has_special_tokens(self, text: str) -> bool:
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return any(token in text for token in {*added, *self.tokenizer.all_special_tokens})

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else [int(token) for token in prompt]


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    found: set[int] = set()
    given: tuple[Any, ...] = (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id)
    for ids in given:
        found.update([ids] if isinstance(ids, int) else ids or ())
    return found
