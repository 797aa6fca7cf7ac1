"""Renders conversations with a tokenizer's chat template, and finds the tokens that the assistant wrote."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# Some templates show today's date. The same conversation has to have the same tokens tomorrow, or a capture that is
# continued would take it for another document. Llama's templates fall back on this day too.
_DAY = datetime.datetime(2024, 7, 26)
_DATE_FORMATS = [f"%{letter}" for letter in "aAbBcdHIjmMpSUwWxXyYZ"]
# A character that no template has stands for the date.
_DATE_MARK = "\ue000"
# transformers offers templates this function, and accepts no other in its place.
_DATE_FUNCTION = "strftime_now"
_GENERATION = re.compile(r"\{%-?\s*generation\b")


def is_conversation(value: Any) -> bool:
    """Returns whether a value is a list of messages, each an object with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
    """Applies a tokenizer's chat template, which reads the same date on every day.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The conversation.
        **options: Arguments of ``apply_chat_template``.

    Returns:
        The result of ``apply_chat_template``: a dict with ``input_ids`` unless the options say otherwise.

    Raises:
        ValueError: The tokenizer has no chat template, or the template does not accept the conversation.
    """
    defaults = {"tokenize": True, "return_dict": True, "chat_template": _dateless(_template(tokenizer))}
    try:
        return tokenizer.apply_chat_template(list(messages), **defaults | options)
    # Templates raise errors of jinja2, and those of Python that malformed messages cause, which share no base class.
    except Exception as error:
        raise ValueError(f"the chat template does not accept the conversation: {error}") from error


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Encodes a conversation and finds the tokens that the assistant wrote.

    They are those between ``{% generation %}`` and ``{% endgeneration %}`` of the template, as with TRL's
    ``assistant_only_loss``. For a template without these marks they are the tokens by which each answer extends the
    conversation before it, up to and including the last end of text among them.

    Returns:
        The token ids, and the ascending positions in [1, T) of the assistant's tokens.

    Raises:
        ValueError: The same as in ``render``; or the template has no such marks and an answer does not extend the
            conversation before it.
    """
    if _GENERATION.search(_template(tokenizer)):
        encoded = render(tokenizer, messages, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [p for p, own in enumerate(encoded["assistant_masks"]) if own and p > 0]
    ids = list(render(tokenizer, messages)["input_ids"])
    positions: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = list(render(tokenizer, messages[:index], add_generation_prompt=True)["input_ids"]) if index else []
        after = list(render(tokenizer, messages[: index + 1])["input_ids"])
        if after[: len(before)] != before or ids[: len(after)] != after:
            raise ValueError(
                f"message {index} of the conversation does not extend what the chat template makes of the messages "
                "before it: mark the assistant's part of the template with {% generation %} and {% endgeneration %}"
            )
        ends = [p for p in range(len(before), len(after)) if after[p] == tokenizer.eos_token_id]
        positions += range(max(len(before), 1), ends[-1] + 1 if ends else len(after))
    return ids, positions


def with_system(messages: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Returns a conversation whose system message begins with a text, made where there is none.

    Raises:
        ValueError: The system message holds something else than text.
    """
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    if not isinstance(first.get("content"), str):
        raise ValueError(
            f"the system message must be text to have a teacher's prefix, got {type(first.get('content')).__name__}"
        )
    return [first | {"content": f"{text}\n\n{first['content']}"}, *messages[1:]]


def around_date(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    """Returns the prompt of a conversation before and after today's date, or None if the template shows none.

    A server renders the template on the day of the request, so a prompt of yesterday has other tokens.
    """
    template = _template(tokenizer)
    if _DATE_FUNCTION not in template:
        return None
    marked = f"{{% macro {_DATE_FUNCTION}(format) %}}{_DATE_MARK}{{% endmacro %}}\n{template}"
    text = render(tokenizer, messages, chat_template=marked, tokenize=False, add_generation_prompt=True)
    before, found, after = str(text).partition(_DATE_MARK)
    return (before, after) if found and _DATE_MARK not in after else None


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ValueError("a conversation needs a tokenizer with a chat template: give the one of a chat model")
    return tokenizer.get_chat_template()


def _dateless(template: str) -> str:
    """Returns a template in which the function for today's date gives always the same day."""
    if _DATE_FUNCTION not in template:
        return template
    filters = "".join(f"|replace({code!r}, {_DAY.strftime(code)!r})" for code in _DATE_FORMATS)
    # The newline after the macro belongs to it: blocks take theirs with them.
    return f"{{% macro {_DATE_FUNCTION}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"
