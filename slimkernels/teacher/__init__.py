"""Loads a teacher, lets it generate text or reads yours, and captures its logits into a store.

Each step is a module; this one exports the public names.
"""

from slimkernels.models.final_layers import load_final_layers
from slimkernels.models.fingerprints import tokenizer_fingerprint
from slimkernels.models.load import (
    EMBEDDED_TEACHERS,
    ModelNotFoundError,
    load_model,
    load_teacher,
    load_tokenizer,
)
from slimkernels.models.sanity import TeacherSanityError, check_teacher_sanity
from slimkernels.served_rows.rows import UnmappedTokensError
from slimkernels.serving.errors import ServerRequestError, ServerUnavailableError
from slimkernels.teacher.added_documents import CaptureReport
from slimkernels.teacher.capture import capture
from slimkernels.teacher.corpus import read_documents, read_prompts, shipped_prompts
from slimkernels.teacher.corpus_files import check_corpus_file
from slimkernels.teacher.generation import GeneratedCorpus, generate_documents
from slimkernels.teacher.hidden_files import HiddenReport, capture_hidden
from slimkernels.teacher.logits import capture_logits
from slimkernels.teacher.ranks import Ranks
from slimkernels.teacher.server import ServerReport, capture_server
from slimkernels.teacher.server_documents import ServerCost
from slimkernels.teacher.tokenized_document import TokenizedDocument

# The name of the last releases, which read as if only teachers were meant.
TeacherNotFoundError = ModelNotFoundError

__all__ = [
    "EMBEDDED_TEACHERS",
    "CaptureReport",
    "GeneratedCorpus",
    "HiddenReport",
    "ModelNotFoundError",
    "Ranks",
    "ServerCost",
    "ServerReport",
    "ServerRequestError",
    "ServerUnavailableError",
    "TeacherNotFoundError",
    "TeacherSanityError",
    "TokenizedDocument",
    "UnmappedTokensError",
    "capture",
    "capture_hidden",
    "capture_logits",
    "capture_server",
    "check_corpus_file",
    "check_teacher_sanity",
    "generate_documents",
    "load_final_layers",
    "load_model",
    "load_teacher",
    "load_tokenizer",
    "read_documents",
    "read_prompts",
    "shipped_prompts",
    "tokenizer_fingerprint",
]
