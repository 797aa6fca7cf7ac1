"""The map from a server's names of tokens to the ids of a tokenizer, byte for byte."""

from __future__ import annotations

import pytest
from support import teachers
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from slimkernels.served_rows.tokens import ServerToken, TokenMap


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.smollm2()[1]


class TestTokens:
    def test_every_token_of_the_vocabulary_is_found_by_its_bytes(self, tokenizer) -> None:
        tokens = TokenMap(tokenizer, len(tokenizer))
        missing = [token for token in range(len(tokenizer)) if tokens.id_of(_by_bytes(tokens, token)) != token]
        # The replacement character stands for any broken bytes.
        assert tokenizer.decode(missing) == "\ufffd"
        text = "Größe 🐈, naïve\n\tcafé <|im_end|> 中文"
        ids = tokenizer(text)["input_ids"]
        assert b"".join(tokens._bytes[token] for token in ids) == text.encode()

    @pytest.mark.parametrize(
        ("token", "found"),
        [
            (ServerToken.named(" the", -1.0), " the"),
            (ServerToken.named("token_id:260", -1.0, [1, 2]), " the"),
            (ServerToken.named("?", -1.0, list(b" the")), " the"),
            (ServerToken.named("bytes: the", -1.0), " the"),
            (ServerToken.named("bytes:\\x20the", -1.0), " the"),
            (ServerToken.named("<|im_end|>", -1.0), "<|im_end|>"),
            (ServerToken.named("", -1.0, [], 2), "<|im_end|>"),
            (ServerToken.named("", -1.0, []), None),
            (ServerToken.named("\ufffd", -1.0), None),
            (ServerToken.named(" the mat", -1.0), None),
            (ServerToken.named("token_id:49152", -1.0), None),
            # An id of another vocabulary.
            (ServerToken.named(" the", -1.0, list(b" the"), 261), None),
        ],
    )
    def test_names(self, token, found, tokenizer) -> None:
        tokens = TokenMap(tokenizer, len(tokenizer))
        expected = None if found is None else tokenizer.convert_tokens_to_ids(found.replace(" ", "Ġ"))
        assert tokens.id_of(token) == expected
        assert (tokens.seen, tokens.unmapped) == (1, int(found is None))

    def test_tokens_that_share_their_bytes(self) -> None:
        """A special token before the same text, and that before single bytes, as the tokenizer itself decides."""
        vocab = {"<unk>": 0, "<0x41>": 1, "<0xE2>": 2, "A": 3, "\u2581the": 4, "<end>": 5, " the": 6}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
        parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(parts)
        backend.add_special_tokens(["<end>"])
        tokens = TokenMap(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"), 7)
        assert tokens.id_of(ServerToken("A", -1.0)) == 3
        assert tokens.id_of(ServerToken("\ufffd", -1.0, b"\xe2")) == 2
        assert tokens.id_of(ServerToken("<end>", -1.0)) == 5
        # Two ordinary tokens for the same bytes: no way to tell.
        assert tokens.id_of(ServerToken(" the", -1.0)) is None

    def test_a_tokenizer_whose_bytes_are_not_known(self) -> None:
        backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        with pytest.raises(ValueError, match="must be a fast one, byte-level or with byte fallback"):
            TokenMap(PreTrainedTokenizerFast(tokenizer_object=backend), 1)

    @pytest.mark.parametrize(
        ("token", "expected", "may"),
        [
            (ServerToken("token_id:260", -1.0, None, 260), 260, True),
            (ServerToken("token_id:261", -1.0, None, 261), 260, False),
            # An id beyond the vocabulary is another token too.
            (ServerToken("token_id:49152", -1.0, None, 49152), 260, False),
            (ServerToken("token_id:-1", -1.0, None, -1), 260, False),
            (ServerToken(" the", -1.0), 260, True),
            (ServerToken(" a", -1.0), 260, False),
            (ServerToken("\ufffd", -1.0), 260, True),
        ],
    )
    def test_whether_a_name_may_stand_for_an_id(self, token, expected, may, tokenizer) -> None:
        assert TokenMap(tokenizer, len(tokenizer)).may_be(token, expected) == may

    def test_ids_that_are_not_those_of_the_names_split_nothing(self, tokenizer) -> None:
        tokens = TokenMap(tokenizer, len(tokenizer))
        named = [ServerToken.named(f"token_id:{token}", -1.0) for token in (260, 5249)]
        assert list(tokens.split([260, 5249], named)) == [0, 1]
        assert list(tokens.split([260, 5250], named)) == [0]

    @pytest.mark.parametrize("entry", [(" the", "-1.0"), (" the", True), (" the", -1.0, 5), (" the", -1.0, None, True)])
    def test_entries_of_other_types(self, entry) -> None:
        with pytest.raises(TypeError, match="a token has a number, bytes and an id or null"):
            ServerToken.named(*entry)


def _by_bytes(tokens: TokenMap, token: int) -> ServerToken:
    return ServerToken("\ufffd", -1.0, tokens._bytes[token])
