"""Scorers of steps by models of transformers: process-reward models, and language models that answer yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slimkernels.models.evaluation import context_length
from slimkernels.models.fingerprints import trace_weights_fingerprint
from slimkernels.search.judges import last_logits, pad_right
from slimkernels.search.step_prompts import DEFAULT_TEMPLATE, StepPrompt


class ProcessRewardModel:
    r"""A scorer of steps by a process-reward model: the probability that the last step of a branch is right.

    score = softmax(logits)[1], or sigmoid(logit) of a model with one label, at the last token of the separator that
    follows the step. Beginning, steps and separators are tokenised one by one, as the models below were trained:

    - ``trl.experimental.prm.PRMTrainer``: the defaults.
    - Qwen2.5-Math-PRM: ``separator="<extra_0>"``, ``chat=True``, ``system="Please reason step by step, and put your
      final answer within \\boxed{}."``, loaded with ``trust_remote_code=True``.

    Math-Shepherd's model is a causal language model, see ``StepVerifier``. A branch that is longer than the model's
    context is read without its first steps.

    Args:
        model: A token-classification model with one or two labels, the second of which means right; it is put into
            evaluation mode.
        tokenizer: Tokenizer of the model.
        template: Text before the first step, with the placeholder ``{question}`` (the question's context).
        separator: Text that follows every step.
        chat: Whether the text before the first step is a user's message in the tokenizer's chat template.
        system: Message of the system before it; needs ``chat``.
        batch_size: Number of branches per forward. With 1 a score does not depend on its batch, to the last bit.

    Raises:
        ValueError: The tokenizer lacks the chat template, or makes no token of the separator.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "{question}",
        separator: str = "\n",
        chat: bool = False,
        system: str | None = None,
        batch_size: int = 1,
    ) -> None:
        if system is not None and not chat:
            raise ValueError("system has no meaning without chat=True, whose first message it is: omit it")
        if chat and not tokenizer.chat_template:
            raise ValueError("chat must be False for a tokenizer without a chat template, got True")
        self._separator = _plain_ids(tokenizer, separator)
        if not self._separator:
            raise ValueError(f"separator must have at least one token, got {separator!r}")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.template, self.chat, self.system = template, chat, system
        self.settings = _identity(model) | {
            "template": template,
            "separator": separator,
            "chat": chat,
            "system": system,
        }

    @classmethod
    def from_pretrained(cls, name_or_path: str, *, load: dict[str, Any] | None = None, **options: Any) -> Any:
        """Loads a model and its tokenizer from a directory or the Hugging Face Hub.

        Args:
            name_or_path: Directory, or name on the Hub.
            load: Arguments of the model's own ``from_pretrained``, such as ``dtype`` and ``trust_remote_code``.
            **options: Arguments of this class.

        Raises:
            ValueError: The files lack weights of the model, as those of a language model lack a classifier's.
        """
        load = load or {}
        auto = AutoModel if load.get("trust_remote_code") else AutoModelForTokenClassification
        model, info = auto.from_pretrained(name_or_path, output_loading_info=True, **load)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise ValueError(
                f"{name_or_path} must be a process-reward model for token classification, but has no weights for "
                f"{missing}: give a language model to StepVerifier, and a model with code of its own "
                "load={'trust_remote_code': True}"
            )
        return cls(model, AutoTokenizer.from_pretrained(name_or_path), **options)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Sequence[str]], context: Sequence[str]) -> list[float]:
        """Computes the score of the last step of every branch."""
        encoded = [_encode(self, steps, question) for steps, question in zip(texts, context, strict=True)]
        scores: list[float] = []
        for first in range(0, len(encoded), self.batch_size):
            padded, lengths = pad_right(encoded[first : first + self.batch_size], self.model.device)
            mask = (torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]).long()
            output = self.model(padded, attention_mask=mask)
            logits = getattr(output, "logits", output[0])[torch.arange(len(lengths)), lengths - 1]
            scores += _of_right(logits.float()).tolist()
        return scores

    def encode(self, steps: Sequence[str], question: str) -> list[int]:
        """Returns the token ids of a branch, up to the separator after its last step."""
        token_ids = self._begin(self.template.replace("{question}", question))
        for step in steps:
            token_ids += _plain_ids(self.tokenizer, step.strip()) + self._separator
        return token_ids

    def _begin(self, text: str) -> list[int]:
        if not self.chat:
            bos: Any = self.tokenizer.bos_token_id
            token_ids = _plain_ids(self.tokenizer, text)
            return token_ids if bos is None else [bos, *token_ids]
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": text})
        return _in_chat(self.tokenizer, messages)


class StepVerifier:
    r"""A scorer of steps by a causal language model that is asked whether the last step of a branch is right.

    score = P(yes) / (P(yes) + P(no)), each the sum of the probabilities of the next token over the first tokens of the
    word's spellings, without those with which a spelling of the other word begins.

    Math-Shepherd's process-reward model reads the steps with a mark after each, and answers "+" or "-":
    ``StepVerifier(model, tokenizer, template="{question} {steps} ки", separator=" ки\n", yes=["+"], no=["-"])``. A
    branch that is longer than the model's context is read without its first steps.

    Args:
        model: A causal language model; it is put into evaluation mode.
        tokenizer: Tokenizer of the model.
        template: Prompt with the placeholders ``{question}`` (the question's context), ``{steps}`` (all steps of the
            branch) and ``{step}`` (the last one).
        separator: Text between two steps.
        yes: Spellings of "yes".
        no: Spellings of "no".
        chat: Whether the prompt is a user's message in the tokenizer's chat template. None: if it has one and the
            template of the prompt is the default.
        batch_size: Number of branches per forward. With 1 a score does not depend on its batch, to the last bit.

    Raises:
        ValueError: No first token tells the words apart, or the template has no place for a step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = DEFAULT_TEMPLATE,
        separator: str = "\n",
        yes: Sequence[str] = ("yes", "Yes", " yes", " Yes"),
        no: Sequence[str] = ("no", "No", " no", " No"),
        chat: bool | None = None,
        batch_size: int = 1,
    ) -> None:
        if chat and not tokenizer.chat_template:
            raise ValueError("chat must be False for a tokenizer without a chat template, got True")
        self.prompt = StepPrompt.of(template, separator)
        self.chat = bool(tokenizer.chat_template) and template == DEFAULT_TEMPLATE if chat is None else chat
        self._yes, self._no = _first_tokens(tokenizer, yes, no), _first_tokens(tokenizer, no, yes)
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.settings = _identity(model) | self.prompt.settings | {"chat": self.chat, "yes": [*yes], "no": [*no]}

    @classmethod
    def from_pretrained(cls, name_or_path: str, *, load: dict[str, Any] | None = None, **options: Any) -> StepVerifier:
        """Loads a model and its tokenizer from a directory or the Hugging Face Hub.

        Args:
            name_or_path: Directory, or name on the Hub.
            load: Arguments of the model's own ``from_pretrained``, such as ``dtype``.
            **options: Arguments of this class.
        """
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **load or {})
        return cls(model, AutoTokenizer.from_pretrained(name_or_path), **options)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Sequence[str]], context: Sequence[str]) -> list[float]:
        """Computes the score of the last step of every branch."""
        encoded = [_encode(self, steps, question) for steps, question in zip(texts, context, strict=True)]
        scores: list[float] = []
        for first in range(0, len(encoded), self.batch_size):
            logits = last_logits(self.model, *pad_right(encoded[first : first + self.batch_size], self.model.device))
            yes, no = (logits[:, ids].float().logsumexp(-1) for ids in (self._yes, self._no))
            scores += (yes - no).sigmoid().tolist()
        return scores

    def encode(self, steps: Sequence[str], question: str) -> list[int]:
        """Returns the token ids of the prompt about a branch."""
        text = self.prompt.fill(steps, question)
        if not self.chat:
            return self.tokenizer(text)["input_ids"]
        messages = [{"role": "user", "content": text}]
        return _in_chat(self.tokenizer, messages)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, word: Sequence[str], other: Sequence[str]) -> list[int]:
    """Returns the ids of the tokens with which spellings of one word begin, and none of the other word."""
    own, others = ({_plain_ids(tokenizer, text)[0] for text in spellings} for spellings in (word, other))
    if not own - others:
        raise ValueError(f"yes and no must begin with different tokens, got {list(word)} and {list(other)}")
    return sorted(own - others)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of a text, without those that a tokenizer adds."""
    token_ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(token_ids)


def _in_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Returns messages in the tokenizer's chat template as token ids, up to the beginning of the answer."""
    token_ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(token_ids)


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": trace_weights_fingerprint(model),
    }


def _of_right(logits: Tensor) -> Tensor:
    """Returns the probability (B,) that steps are right, of logits (B, 1) or (B, 2)."""
    if logits.shape[-1] not in (1, 2):
        raise ValueError(f"a process-reward model must have one or two labels, got {logits.shape[-1]}")
    return logits[:, 0].sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)[:, 1]


def _encode(scorer: ProcessRewardModel | StepVerifier, steps: Sequence[str], question: str) -> list[int]:
    """Returns the token ids of a branch, without its first steps where all would exceed the model's context."""
    limit, token_ids = context_length(scorer.model.config), scorer.encode(steps, question)
    for first in range(1, len(steps)):
        if limit is None or len(token_ids) <= limit:
            break
        token_ids = scorer.encode(steps[first:], question)
    if limit is not None and len(token_ids) > limit:
        raise ValueError(
            f"question and last step must have at most {limit} tokens, the context of the scorer's model, got "
            f"{len(token_ids)}"
        )
    return token_ids
