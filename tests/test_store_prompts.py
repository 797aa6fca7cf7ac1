"""The lengths of the documents' prompts in a store."""

from __future__ import annotations

import pytest
import safetensors
import safetensors.torch
from support.store_cases import SETTINGS, Case, random_case

import slimkernels.store
from slimkernels.store import Store, StoreWriter, errors, info, verify


class TestPromptLengths:
    """They lie next to the shard, where readers of version 0.1.0 do not look."""

    def write(self, path, generator, lengths=(3, 0, 4)) -> list[Case]:
        cases = [random_case(9 + i, 4, generator) for i in range(len(lengths))]
        with StoreWriter(path, **SETTINGS) as writer:
            for case, length in zip(cases, lengths, strict=True):
                writer.add(*case, prompt_length=length)
        return cases

    def test_come_back(self, tmp_path, generator) -> None:
        self.write(tmp_path / "store", generator)
        verify(tmp_path / "store")
        store = Store(tmp_path / "store")
        assert [document.prompt_length for document in store] == [3, 0, 4]
        assert [store.packed(i).prompt_length for i in range(3)] == [3, 0, 4]
        assert info(tmp_path / "store")["bytes"] == sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
        tensors = safetensors.torch.load_file(tmp_path / "store" / "prompts-000000.safetensors")
        assert tensors["prompt_lengths"].tolist() == [3, 0, 4]

    def test_change_no_byte_of_manifest_and_shard(self, tmp_path, generator) -> None:
        state = generator.get_state()
        self.write(tmp_path / "with", generator)
        generator.set_state(state)
        self.write(tmp_path / "without", generator, (0, 0, 0))
        names = {path.name: path.read_bytes() for path in (tmp_path / "without").iterdir()}
        assert "prompts-000000.safetensors" not in names
        for name, content in names.items():
            assert (tmp_path / "with" / name).read_bytes() == content

    def test_of_another_shard_or_damaged_are_refused(self, tmp_path, generator) -> None:
        self.write(tmp_path / "a", generator)
        self.write(tmp_path / "b", generator)
        path = tmp_path / "a" / "prompts-000000.safetensors"
        good = path.read_bytes()
        for content in (
            (tmp_path / "b" / path.name).read_bytes(),
            good[:-1],
            good + b"\0",
            b"",
            good[:-4] + b"\5\0\0\0",
            good.replace(b"I32", b"U32"),
        ):
            path.write_bytes(content)
            with pytest.raises(errors.PromptLengthsError, match=r"prompts-000000.safetensors: its bytes are not those"):
                verify(tmp_path / "a")
            with pytest.raises(errors.PromptLengthsError):
                Store(tmp_path / "a")[0]
        path.unlink()
        verify(tmp_path / "a")
        assert [document.prompt_length for document in Store(tmp_path / "a")] == [0, 0, 0]

    def test_that_a_killed_writer_left_belong_to_nobody(self, tmp_path, generator) -> None:
        self.write(tmp_path, generator)
        (tmp_path / "prompts-000001.safetensors").write_bytes(b"left")
        verify(tmp_path)
        with StoreWriter(tmp_path, **SETTINGS) as writer:
            writer.add(*random_case(5, 2, generator))
        verify(tmp_path)
        assert [document.prompt_length for document in Store(tmp_path)] == [3, 0, 4, 0]

    @pytest.mark.parametrize("length", [-1, 6])
    def test_lie_within_the_document(self, tmp_path, generator, length) -> None:
        with (
            StoreWriter(tmp_path, **SETTINGS) as writer,
            pytest.raises(
                ValueError, match=rf"prompt_length must lie in \[0, 5\], the number of input_ids, got {length}"
            ),
        ):
            writer.add(*random_case(5, 2, generator), prompt_length=length)

    def test_of_parts(self, tmp_path, generator) -> None:
        cases = [random_case(9 + i, 4, generator) for i in range(6)]
        with slimkernels.store.RankWriter(tmp_path, num_parts=3, **SETTINGS) as writer:
            for length, case in enumerate(cases):
                writer.add(*case, prompt_length=length)
        verify(tmp_path)
        store = Store(tmp_path)
        assert [store[store.find(case.input_ids)].prompt_length for case in cases] == list(range(6))

    def test_belong_to_the_fingerprint_of_a_store(self, tmp_path, generator) -> None:
        state, stores = generator.get_state(), {}
        for name, lengths in (("a", (3, 0, 4)), ("b", (3, 0, 5)), ("unknown", (0, 0, 0)), ("again", (3, 0, 4))):
            generator.set_state(state)
            self.write(tmp_path / name, generator, lengths)
            stores[name] = Store(tmp_path / name)
        found = {name: store.fingerprint for name, store in stores.items()}
        assert found["a"] == found["again"]
        assert len({found["a"], found["b"], found["unknown"]}) == 3
        # A store without prompts has the fingerprint of version 0.1.0, which checkpoints hold.
        assert {store.rows_fingerprint for store in stores.values()} == {found["unknown"]}
        assert stores["unknown"].prompts_fingerprint is None
        (tmp_path / "a" / "prompts-000000.safetensors").unlink()
        assert Store(tmp_path / "a").fingerprint == found["unknown"]
