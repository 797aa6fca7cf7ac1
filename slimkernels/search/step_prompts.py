"""The text that asks a language model whether the last step of a branch is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

DEFAULT_TEMPLATE = "{question}\n\nSteps:\n{steps}\n\nIs the last step right? Answer yes or no."


class StepPrompt(NamedTuple):
    """A template with the placeholders ``{question}``, ``{steps}`` and ``{step}``, the last one alone.

    Attributes:
        template: Text with at least one of ``{steps}`` and ``{step}``.
        separator: Text between two steps.
    """

    template: str
    separator: str

    @classmethod
    def of(cls, template: str, separator: str) -> StepPrompt:
        """Returns the prompt of a template.

        Raises:
            ValueError: The template has no place for a step.
        """
        if "{steps}" not in template and "{step}" not in template:
            raise ValueError(f"template must contain {{steps}} or {{step}}, the places of the steps, got {template!r}")
        return cls(template, separator)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the text depends on, as JSON values."""
        return {"template": self.template, "separator": self.separator}

    def fill(self, steps: Sequence[str], question: str) -> str:
        """Returns the text about the last of the steps. Braces in question and steps mean nothing."""
        texts = [step.strip() for step in steps]
        values = {"question": question.strip(), "steps": self.separator.join(texts), "step": texts[-1]}
        return re.sub(r"\{(question|steps|step)\}", lambda match: values[match[1]], self.template)
