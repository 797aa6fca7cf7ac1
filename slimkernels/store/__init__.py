"""Stores the kept logits of a teacher on disk; every byte is checked when it is read (format: FORMAT.md).

>>> import tempfile, torch
>>> from slimkernels import SparseLogits
>>> row = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
>>> teacher = SparseLogits(torch.tensor([[1, 3]], dtype=torch.int32), row[:, [1, 3]], row.logsumexp(-1, keepdim=True))
>>> with tempfile.TemporaryDirectory() as path:
...     with StoreWriter(path, vocab_size=4, tokenizer_fingerprint="", teacher={}, selection={}) as writer:
...         writer.add(input_ids=[2, 3], positions=[1], teacher=teacher)
...     verify(path)
...     Store(path)[0].teacher.ids.tolist()
[[1, 3]]
"""

from slimkernels.store import errors
from slimkernels.store.audit import info, verify, verify_complete
from slimkernels.store.dataset import StoreDataset, StoreIterableDataset, collate_documents
from slimkernels.store.errors import StoreError
from slimkernels.store.mixed_stores import MixedStores
from slimkernels.store.order import DocumentOrder
from slimkernels.store.rank_writer import RankWriter
from slimkernels.store.reader import Document, PackedDocument, Store
from slimkernels.store.shares import ShareOrder
from slimkernels.store.stats import document_entropies, stats
from slimkernels.store.writer import StoreWriter

__all__ = [
    "Document",
    "DocumentOrder",
    "MixedStores",
    "PackedDocument",
    "RankWriter",
    "ShareOrder",
    "Store",
    "StoreDataset",
    "StoreError",
    "StoreIterableDataset",
    "StoreWriter",
    "collate_documents",
    "document_entropies",
    "errors",
    "info",
    "stats",
    "verify",
    "verify_complete",
]
