"""The teacher's side: load it, let it write its own text or read yours, and capture its logits into a store.

Each step is a module of its own; this one names what is public.
"""

from slimkernels.server_client import ServerRequestError, ServerUnavailableError
from slimkernels.teacher_capture import CaptureReport, capture
from slimkernels.teacher_checks import TeacherSanityError, check_teacher_sanity, tokenizer_fingerprint
from slimkernels.teacher_corpus import check_corpus_file, read_documents, read_prompts, shipped_prompts
from slimkernels.teacher_generation import GeneratedCorpus, generate_documents
from slimkernels.teacher_logits import capture_logits
from slimkernels.teacher_model import (
    EMBEDDED_TEACHERS,
    TeacherNotFoundError,
    load_model,
    load_teacher,
    load_tokenizer,
)
from slimkernels.teacher_ranks import Ranks
from slimkernels.teacher_server import ServerCost, ServerReport, capture_server
from slimkernels.teacher_server_rows import UnmappedTokensError

__all__ = [
    "EMBEDDED_TEACHERS",
    "CaptureReport",
    "GeneratedCorpus",
    "Ranks",
    "ServerCost",
    "ServerReport",
    "ServerRequestError",
    "ServerUnavailableError",
    "TeacherNotFoundError",
    "TeacherSanityError",
    "UnmappedTokensError",
    "capture",
    "capture_logits",
    "capture_server",
    "check_corpus_file",
    "check_teacher_sanity",
    "generate_documents",
    "load_model",
    "load_teacher",
    "load_tokenizer",
    "read_documents",
    "read_prompts",
    "shipped_prompts",
    "tokenizer_fingerprint",
]
