"""What the suffix drafter keeps on disk: round trips, damaged files, and files that belong to something else."""

from __future__ import annotations

import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from decoding.drafters.suffix import SuffixOptions
from decoding.drafters.suffix_file import CHECKSUM_BYTES, HEADER, MAGIC, Kept, SuffixFile, checksum, fingerprint
from decoding.errors import ModelError
from decoding.text import Tokenizer
from tests.engines import ROOT, demo_tokenizer
from tests.unit.test_suffix import Served, ask, stats

VOCABULARY = bytes(range(32))
TEXTS = (torch.tensor([7, -8, 7]), torch.tensor([2, 1, 3]), torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.int32))
NOTHING = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))


def written(path: Path) -> SuffixFile:
    file = SuffixFile(str(path), VOCABULARY)
    file.write(Kept(b"k" * 32, TEXTS))
    return file


@pytest.mark.parametrize("texts", [TEXTS, NOTHING], ids=["some", "none"])
def test_what_is_written_is_read(tmp_path: Path, texts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    file = SuffixFile(str(tmp_path / "kept"), VOCABULARY)
    assert file.read() is None
    file.write(Kept(b"k" * 32, texts))
    kept = file.read()
    assert kept is not None
    assert kept.key == b"k" * 32
    for ours, theirs in zip(kept.texts, texts, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o600, "others' texts are nobody's business"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def shorter(content: bytes) -> bytes:
    return content[:-1]


def flipped(content: bytes) -> bytes:
    place = HEADER.size + 3
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def next_version(content: bytes) -> bytes:
    changed = content[: len(MAGIC)] + struct.pack("<I", 2) + content[len(MAGIC) + 4 : -CHECKSUM_BYTES]
    return changed + checksum(changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorter, "instead of .* bring back a copy"),
        (lambda content: content[:40], "is truncated; delete it"),
        (lambda content: content + b"x", "instead of"),
        (flipped, "is damaged: its checksum is wrong; delete it"),
        (next_version, "has format 2, and this version reads format 1; delete it"),
        (lambda content: b"", "is no file of suffix decoding; name another one: --speculate suffix=FILE"),
        (lambda content: b"PK\x03\x04" + content, "is no file of suffix decoding"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = written(tmp_path / "kept")
    file.path.write_bytes(damage(file.path.read_bytes()))
    with pytest.raises(ModelError, match=message) as caught:
        file.read()
    assert str(file.path) in str(caught.value)


def test_a_file_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "kept")
    with pytest.raises(ModelError, match=r"another tokenizer.*name another file"):
        SuffixFile(str(tmp_path / "kept"), bytes(32)).read()


def test_places_that_cannot_hold_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .*create it"):
        SuffixFile(str(tmp_path / "no" / "kept"), VOCABULARY)
    with pytest.raises(ModelError, match=r"cannot be read .*name another file"):
        SuffixFile(str(tmp_path), VOCABULARY).read()


def test_fingerprints_tell_vocabularies_apart(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "demo/target", tmp_path / "same", ignore=shutil.ignore_patterns("*.safetensors"))
    same = Tokenizer.load(tmp_path / "same")
    assert fingerprint(same) == fingerprint(demo_tokenizer())
    same._vocab["another"] = same.vocab_size
    assert fingerprint(same) != fingerprint(demo_tokenizer())


def test_a_write_that_fails_is_logged_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    file = written(folder / "kept")
    shutil.rmtree(folder)
    with caplog.at_level(logging.WARNING):
        file.write(Kept(b"k" * 32, TEXTS))
    assert "cannot be kept in" in caplog.text
    folder.mkdir()
    file.write(Kept(b"k" * 32, TEXTS))
    assert file.read() is not None


def test_a_server_goes_on_where_it_ended(tmp_path: Path) -> None:
    options = SuffixOptions(path=str(tmp_path / "kept"))
    first = Served(options)
    alone = stats(first.run(ask("one", "tenant secret"))[0])
    before = first.drafter.cache.texts()
    first.engine.close()
    assert b"tenant secret" not in (tmp_path / "kept").read_bytes()

    second = Served(options)
    for ours, theirs in zip(second.drafter.cache.texts(), before, strict=True):
        assert torch.equal(ours, theirs)
    assert stats(second.run(ask("two", "other"))[0]) == alone, "salts are told apart as before"
    again = stats(second.run(ask("three", "tenant secret"))[0])
    assert again.accepted > alone.accepted


def test_the_file_is_written_now_and_then(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    served = Served(SuffixOptions(path=str(path), save_interval=0))
    served.run(ask("one", tokens=7))
    assert served.drafter._file is not None
    served.drafter._file.wait()
    kept = served.drafter._file.read()
    assert kept is not None
    assert len(kept.texts[2]) == 7
    patient = Served(SuffixOptions(path=str(tmp_path / "later"), save_interval=3600))
    patient.run(ask("one"))
    assert not (tmp_path / "later").exists()
    patient.engine.close()
    assert (tmp_path / "later").exists()


def test_a_limit_that_was_lowered_keeps_the_newest(tmp_path: Path) -> None:
    served = Served(SuffixOptions(path=str(tmp_path / "kept")))
    for number in range(4):
        served.run(ask(f"r{number}", tokens=5 + number))
    served.engine.close()
    smaller = Served(SuffixOptions(path=str(tmp_path / "kept"), max_cached_requests=2))
    assert smaller.drafter.cache.texts()[1].tolist() == [7, 8]


def test_a_server_that_learned_nothing_can_start_again(tmp_path: Path) -> None:
    options = SuffixOptions(path=str(tmp_path / "kept"))
    Served(options).engine.close()
    again = Served(options)
    assert again.drafter.cache.usage()[:2] == [0, 0]
    assert again.run(ask("one"))[0].tokens == Served().run(ask("one"))[0].tokens
