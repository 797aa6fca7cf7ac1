"""The teacher's kept logits on disk: written once, checked always, decoded row by row (FORMAT.md)."""

from slimkernels.store import errors
from slimkernels.store.audit import info, verify
from slimkernels.store.errors import StoreError
from slimkernels.store.reader import Document, Store
from slimkernels.store.writer import StoreWriter

__all__ = ["Document", "Store", "StoreError", "StoreWriter", "errors", "info", "verify"]
