"""Defines an exception for each way in which a store can be invalid."""

from __future__ import annotations


class StoreError(Exception):
    """A store cannot be used or trusted.

    Attributes:
        file: Name of the file inside the store, or None for the store as a whole.
        document: Index of the document in the store, or None if it is not known.
        row: Index of the row inside the shard ``file``, or None if it is not known.
    """

    # One positional argument with defaults after it: data loader workers rebuild exceptions from the message alone.
    def __init__(
        self, message: str, *, file: str | None = None, document: int | None = None, row: int | None = None
    ) -> None:
        place = [] if file is None else [file]
        if document is not None:
            place.append(f"document {document}")
        if row is not None:
            place.append(f"row {row}")
        super().__init__(": ".join([", ".join(place), message] if place else [message]))
        self.message = message
        self.file = file
        self.document = document
        self.row = row

    def within(self, folder: str) -> StoreError:
        """Returns the same error with its file named relative to the parent of ``folder``."""
        file = folder if self.file is None else f"{folder}/{self.file}"
        return type(self)(self.message, file=file, document=self.document, row=self.row)


class ByteOrderError(StoreError):
    """The host is big-endian; the format is little-endian and read in place."""


class NotAStoreError(StoreError):
    """The path is not a directory, has no manifest, or holds something other than a store."""


class ManifestSyntaxError(StoreError):
    """The manifest is not the JSON document that the format requires."""


class ManifestChecksumError(StoreError):
    """The bytes of the manifest are not those that were written."""


class UnsupportedVersionError(StoreError):
    """The store is of a version of the format that this release does not know, most likely of a newer one."""


class ManifestFieldError(StoreError):
    """A field of the manifest is missing, unknown, of the wrong type, out of range, or contradicts another."""


class ShardNameError(StoreError):
    """A shard has another name than its index in the manifest requires; no other name is ever opened."""


class MissingShardError(StoreError):
    """A shard of the manifest does not exist."""


class UnexpectedFileError(StoreError):
    """The directory holds a file that does not belong to the store."""


class ShardSizeError(StoreError):
    """A shard is shorter or longer than its manifest entry says."""


class ShardHeaderError(StoreError):
    """A shard's safetensors header is not the one its manifest entry implies."""


class ShardIndexError(StoreError):
    """A shard's index (offsets, hashes, row checksums, positions) is damaged or contradicts itself."""


class ShardChecksumError(StoreError):
    """The bytes of a shard are not those that were written."""


class PromptLengthsError(StoreError):
    """The prompt lengths next to a shard are damaged, or belong to another shard."""


class TeacherContextError(StoreError, ValueError):
    """A document was captured from what the teacher read in another context, or the file that tells so is damaged."""


class HeadError(StoreError):
    """The teacher's head in a store of hidden states is missing, damaged, or another one."""


class DocumentDamagedError(StoreError):
    """The token ids of a document do not match its hash, or lie outside the vocabulary."""


class RowChecksumError(StoreError):
    """The bytes of a row are not those that were written."""


class RowDataError(StoreError):
    """A row has the right checksum but is not one that an encoder writes (ids, logits, lse or target_logit)."""


class SettingsMismatchError(StoreError, ValueError):
    """The store was made with other settings than the requested ones."""


class DuplicateDocumentError(StoreError, ValueError):
    """A document is already in the store, or in it twice."""


class MissingPartError(StoreError):
    """A part of a store of parts does not exist."""


class PartSettingsError(StoreError):
    """A part was made with other settings than the store it is in."""


class MisplacedDocumentError(StoreError):
    """A document lies in another part than the one that its hash selects."""


class MissingDocumentError(StoreError):
    """A document of the corpus is not in the store: the capture is not finished, or was of another corpus."""


class StoreLockedError(StoreError):
    """Another writer holds the store, or its file system has no locks."""
