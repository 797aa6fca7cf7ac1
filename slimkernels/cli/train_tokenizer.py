"""The tokenizer that ``slimkernels train`` saves with a student, where --tokenizer does not name it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_NEEDED = "decode and compare need one: give --tokenizer MODEL, that of the store's teacher"


def find_tokenizer(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase | None, str]:
    """Returns the tokenizer of the student and what is to be said of it, which is empty where all is well.

    Without --tokenizer it is that of the student's own model, else that of the teacher which the store was captured
    from, if it is on this machine and is the store's by its fingerprint.
    """
    from slimkernels.models.fingerprints import tokenizer_fingerprint
    from slimkernels.store import Store
    from slimkernels.store.identity import is_same_tokenizer
    from slimkernels.teacher import load_tokenizer

    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer), ""
    if args.text is not None:
        return (load_tokenizer(args.student) if is_here(args.student) else None), ""
    # The stores have one tokenizer.
    store = Store(args.store[0])
    stored = store.tokenizer_fingerprint
    own = args.student if args.student is not None and not args.student.endswith(".json") else None
    for name in (own, args.teacher, store.settings.teacher.get("name")):
        if not name or not is_here(name):
            continue
        tokenizer = load_tokenizer(name)
        if is_same_tokenizer(stored, tokenizer_fingerprint(tokenizer)) if stored else name == own:
            return tokenizer, ""
        if name == own:
            return None, (
                f"the tokenizer of {own} is not the one that the store was captured with, so the student is saved "
                f"without a tokenizer; {_NEEDED}"
            )
    return None, f"the student is saved without a tokenizer; {_NEEDED}"


def is_here(name: str) -> bool:
    """Returns whether a tokenizer of this name can be loaded without asking a hub."""
    from slimkernels.models.load import EMBEDDED_TEACHERS, ModelNotFoundError, model_origin

    folder = Path(name).expanduser()
    if folder.is_dir():
        return any((folder / file).is_file() for file in _FILES)
    if name not in EMBEDDED_TEACHERS:
        return False
    try:
        model_origin(name)
    except ModelNotFoundError:
        return False
    return True
