"""Every way a store can be bad, by name."""

from __future__ import annotations


class StoreError(Exception):
    """A store cannot be used or trusted.

    Attributes:
        file: The name of the file inside the store, or None when the store as a whole is meant.
        document: The index of the document in the store, where one is known.
        row: The row inside the shard ``file``, where one is known.
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
        """The same error, its file named from the parent of the folder it is in."""
        file = folder if self.file is None else f"{folder}/{self.file}"
        return type(self)(self.message, file=file, document=self.document, row=self.row)


class ByteOrderError(StoreError):
    """The host is big-endian; the format is little-endian and read in place."""


class NotAStoreError(StoreError):
    """The path is no directory, or holds no manifest, or holds something else than a store."""


class ManifestSyntaxError(StoreError):
    """The manifest is not the JSON document the format asks for."""


class ManifestChecksumError(StoreError):
    """The manifest is not the one that was written."""


class UnsupportedVersionError(StoreError):
    """The store was written by another version of the format."""


class ManifestFieldError(StoreError):
    """A field of the manifest is missing, unknown, of the wrong type, out of range, or contradicts another."""


class ShardNameError(StoreError):
    """A shard is not called what its place in the manifest demands; no other name is ever opened."""


class MissingShardError(StoreError):
    """A shard of the manifest is not there."""


class UnexpectedFileError(StoreError):
    """The directory holds a file that the manifest does not account for."""


class ShardSizeError(StoreError):
    """A shard is shorter or longer than its manifest entry says."""


class ShardHeaderError(StoreError):
    """A shard's safetensors header is not the one its manifest entry implies."""


class ShardIndexError(StoreError):
    """A shard's index (offsets, hashes, row checksums, positions) is damaged or contradicts itself."""


class ShardChecksumError(StoreError):
    """A shard's bytes are not those that were written."""


class DocumentDamagedError(StoreError):
    """A document's token ids do not have its hash, or lie outside the vocabulary."""


class RowChecksumError(StoreError):
    """A row's bytes are not those that were written."""


class RowDataError(StoreError):
    """A row has the right checksum but is not a row an encoder writes (ids, logits, lse or target_logit)."""


class SettingsMismatchError(StoreError, ValueError):
    """The store was made with other settings than the ones asked for."""


class DuplicateDocumentError(StoreError, ValueError):
    """A document is in the store already, or twice."""


class MissingPartError(StoreError):
    """A part of a store of parts is not there."""


class PartSettingsError(StoreError):
    """A part was made with other settings than the store it is in."""


class MisplacedDocumentError(StoreError):
    """A document lies in another part than the one its hash names."""


class MissingDocumentError(StoreError):
    """A document of the corpus is not in the store: the capture has not ended, or was another one."""


class StoreLockedError(StoreError):
    """Another writer holds the store."""
