"""Datastores: what is built of a corpus, what is found in it, and what is said when that cannot be."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.datastore import build
from decoding.datastore.build import Chunk, encoded, write
from decoding.datastore.corpus import Piece, find_files, read_pieces
from decoding.datastore.layout import BLOCK, NO_MATCH, PARTS, Datastore, Header, Vocabulary, check_contents
from decoding.errors import ConfigError, ModelError
from server.cli import main
from server.datastore import parse
from tests.datastore import stored
from tests.engines import ROOT, demo_tokenizer

DEMO = str(ROOT / "demo/target")
IDS = 6
documents = st.lists(st.lists(st.integers(0, IDS - 1), min_size=1, max_size=12), min_size=1, max_size=5)


def written(path: Path, texts: list[list[int]], ids: int = IDS) -> Datastore:
    write(path, (Chunk(np.array(text)) for text in texts), Vocabulary("test", ids, "none"))
    return Datastore.open(path)


# building ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(texts=documents)
def test_what_is_built_is_the_sorted_corpus(texts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("built") / "store"
    store, expected = written(path, texts), stored(texts, IDS)
    for part in ("tokens", "starts", "suffixes"):
        np.testing.assert_array_equal(getattr(store, part), getattr(expected, part), part)


@pytest.mark.parametrize(("distinct", "kind"), [(200, "<u2"), (3000, "<u2"), (70_000, "<u4")])
def test_ids_of_one_two_and_three_bytes_are_sorted(distinct: int, kind: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(1).permutation(distinct).tolist()
    store = written(tmp_path / "store", [ids, ids[::-1], ids[: distinct // 2]], distinct)
    assert store.tokens.dtype == np.dtype(kind)
    assert sorted(store.suffixes.tolist()) == list(range(len(store.tokens)))
    tokens = store.tokens.tolist()
    assert all(tokens[a : a + 3] <= tokens[b : b + 3] for a, b in itertools.pairwise(store.suffixes.tolist()))


def test_blocks_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = np.random.default_rng(2).integers(0, 300, (9, 50)).tolist()
    whole = written(tmp_path / "whole", texts, 400)
    monkeypatch.setattr(build, "SORTED_AT_ONCE", 7)
    parts = written(tmp_path / "parts", texts, 400)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    np.testing.assert_array_equal(whole.suffixes, parts.suffixes)


def test_the_same_corpus_makes_the_same_file_and_a_failed_build_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "store"
    written(path, [[1, 2, 3], [4]])
    before = path.read_bytes()
    written(path, [[1, 2, 3], [4]])
    assert path.read_bytes() == before

    def breaks_off() -> Any:
        yield Chunk(np.array([1]))
        raise ConfigError("the corpus is gone")

    with pytest.raises(ConfigError, match="the corpus is gone"):
        write(path, breaks_off(), Vocabulary("test", IDS, "none"))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


def test_a_document_in_several_chunks_is_one(tmp_path: Path) -> None:
    chunks = [Chunk(np.array([1, 2]), ends=False), Chunk(np.array([3])), Chunk(np.array([], dtype=int))]
    header = write(tmp_path / "store", chunks, Vocabulary("test", IDS, "none"))
    assert Datastore.open(tmp_path / "store").tokens.tolist() == [1, 2, 3, IDS]
    assert (header.documents, header.tokens) == (1, 4)


def test_memory_is_asked_for_before_the_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "available_memory", lambda: 10)
    with pytest.raises(ConfigError, match=r"sorting 4 tokens takes .* GiB of memory"):
        written(tmp_path / "store", [[1, 2, 3]])
    assert not list(tmp_path.iterdir())


def test_the_library_is_missed_before_the_corpus_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)

    def unread() -> Any:
        pytest.fail("the corpus was read")
        yield

    with pytest.raises(ConfigError, match=r"pip install 'saccade\[datastore\]'"):
        write(tmp_path / "store", unread(), Vocabulary("test", IDS, "none"))


# the search ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    texts=documents,
    text=st.lists(st.integers(0, IDS + 1), min_size=1, max_size=12),
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted),
    ids=st.integers(1, IDS),
)
def test_the_longest_match_is_the_longest(
    texts: list[list[int]], text: list[int], lengths: list[int], ids: int
) -> None:
    least, most = lengths
    found = stored(texts, IDS).longest(np.array(text), least, most, ids)
    expected: list[tuple[int, int]] = []
    for length in range(min(most, len(text)), least - 1, -1):
        end = text[len(text) - length :]
        places = ((d, i) for d, document in enumerate(texts) for i in range(len(document) - length + 1))
        expected = [(d, i) for d, i in places if texts[d][i : i + length] == end]
        if expected and max(end) < ids:
            break
        expected = []
    assert (found.end - found.first, found.length) == (len(expected), length if expected else 0)


def test_no_match_crosses_documents() -> None:
    store = stored([[1, 2], [3, 4]], IDS)
    assert store.longest(np.array([2, 3]), 1, 16, IDS).length == 1
    for separator in (IDS, IDS + 1):  # a model may have more ids than the tokenizer, and draw them
        assert store.longest(np.array([2, separator, 3]), 1, 16, IDS).length == 1
        assert store.longest(np.array([2, separator]), 1, 16, IDS) == NO_MATCH


# the corpus ----------------------------------------------------------------------------------------------------------


def test_folders_are_gone_through_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.txt", "a.py", ".git/x.py", ".hidden.py", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*include: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path], include)]

    assert names() == ["a.py", "c.md", "b/a.txt", "b/z.py"]
    assert names("*.py") == ["a.py", "b/z.py"]
    assert names("*.py", "*.md") == ["a.py", "c.md", "b/z.py"]
    named = [tmp_path / "c.md", tmp_path, tmp_path / "c.md"]
    assert find_files(named, ("*.py",)) == [tmp_path / "c.md", tmp_path / "a.py", tmp_path / "b/z.py"]
    with pytest.raises(ConfigError, match=r"has no files that fit \*\.rs"):
        find_files([tmp_path], ("*.rs",))
    with pytest.raises(ConfigError, match=r"there is no corpus .*nowhere"):
        find_files([tmp_path / "nowhere"])


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.sampled_from("aé🦉\n\r "), max_size=40), piece=st.integers(1, 9), bom=st.booleans())
def test_pieces_are_the_text(text: str, piece: int, bom: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "file.txt"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    pieces = list(read_pieces(path, piece))
    assert "".join(each.text for each in pieces) == text
    assert [each.ends for each in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sum(each.read for each in pieces) == path.stat().st_size


@pytest.mark.parametrize("piece", [1, 3, 4, 100])
@pytest.mark.parametrize(
    ("data", "byte"), [(b"ab\xff", 2), ("né\n".encode() + b"\x80", 4), (b"line\n\xc3", 5), (b"a\xc3(b", 1)]
)
def test_text_in_another_encoding_is_refused_by_file_and_byte(
    data: bytes, byte: int, piece: int, tmp_path: Path
) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"latin\.txt is not UTF-8 text: byte {byte} is 0x{data[byte]:02x}"):
        list(read_pieces(path, piece))


def test_lines_of_jsonl_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    lines = [{"text": "a"}, {"prompt": "b", "completion": "c", "id": 1}, {"prompt": "d"}, {"token_ids": [1, 2]}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert [(piece.text, piece.token_ids) for piece in read_pieces(path)] == [
        ("a", ()),
        ("bc", ()),
        ("d", ()),
        ("", (1, 2)),
    ]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b"{", "line 2 is no JSON"),
        (b"[1]", "line 2 has no usable"),
        (b'{"text": 5}', "line 2 has no usable"),
        (b'{"completion": "x"}', "line 2 has no usable"),
        (b'{"token_ids": ["x"]}', "line 2 has no usable"),
        (b'{"text": "\\ud83e"}', r"line 2 has a lone surrogate \(U\+D83E at character 0\)"),
        (b'{"text": "\xe9"}', r"some\.jsonl is not UTF-8 text: byte 24 is 0xe9"),
    ],
)
def test_lines_that_are_none(line: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"text": "x"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=part):
        list(read_pieces(path))


def test_ids_of_another_tokenizer_are_refused() -> None:
    tokenizer = demo_tokenizer()
    piece = Piece("", (1, tokenizer.vocab_size), place="x.jsonl, line 7")
    with pytest.raises(ConfigError, match=r"x.jsonl, line 7 has token ids from 1 to .*another tokenizer"):
        list(encoded([piece], tokenizer))


# the file ------------------------------------------------------------------------------------------------------------


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    texts = [[1, 2], [3]]
    header = write(tmp_path / "store", (Chunk(np.array(text)) for text in texts), Vocabulary("é" * 99, IDS, "print"))
    assert check_contents(tmp_path / "store") == header
    assert len(header.spelled()) == BLOCK
    assert (tmp_path / "store").stat().st_size == header.file_bytes


def changed(header: Header, **content: object) -> bytes:
    return json.dumps({**json.loads(header.spelled()), **content}).encode().ljust(BLOCK - 1) + b"\n"


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda data, header: b"", "is no datastore; give a file that was made by saccade datastore build"),
        (lambda data, header: b"PK\x03\x04" + data, "is no datastore"),
        (lambda data, header: data[:100], "header of .* is damaged"),
        (lambda data, header: data[:-1], "is not whole: it has"),
        (lambda data, header: data + b"\0", "is not whole: it has"),
        (lambda data, header: changed(header, version=2) + data[BLOCK:], "a datastore of format 2.*reads format 1"),
        (lambda data, header: changed(header, tokens="5") + data[BLOCK:], "header of .* is damaged"),
        (lambda data, header: changed(header, tokens=0) + data[BLOCK:], "its counts are none"),
        (lambda data, header: changed(header, sha256={}) + data[BLOCK:], "header of .* is damaged"),
        (lambda data, header: changed(header, vocabulary={"size": 3}) + data[BLOCK:], "header of .* is damaged"),
    ],
)
def test_files_that_are_no_datastores(spoil: Any, part: str, tmp_path: Path) -> None:
    path = tmp_path / "store"
    header = write(path, [Chunk(np.array([1, 2]))], Vocabulary("test", IDS, "none"))
    path.write_bytes(spoil(path.read_bytes(), header))
    with pytest.raises(ModelError, match=part) as raised:
        Datastore.open(path)
    assert str(path) in str(raised.value)


def test_opening_reads_the_header_alone(tmp_path: Path) -> None:
    """A file of holes that is larger than memory."""
    header = Header(Vocabulary("huge", IDS, ""), 10**10, 1, dict.fromkeys(PARTS, ""))
    path = tmp_path / "store"
    path.write_bytes(header.spelled())
    os.truncate(path, header.file_bytes)
    store = Datastore.open(path)
    assert (len(store.tokens), len(store.suffixes)) == (10**10, 10**10)
    assert store.suffixes.dtype == np.int64
    assert store.longest(np.array([0]), 1, 16, IDS) == NO_MATCH


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no datastore .*make one with saccade datastore build"):
        Datastore.open(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"cannot be read .*give its file"):
        Datastore.open(tmp_path)


@pytest.mark.parametrize("part", ["tokens", "starts", "suffixes"])
def test_a_changed_byte_is_noticed(part: str, tmp_path: Path) -> None:
    path = tmp_path / "store"
    header = write(path, [Chunk(np.array([1, 2, 3]))], Vocabulary("test", IDS, "none"))
    data = bytearray(path.read_bytes())
    data[header.offsets[part]] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"the {part} of .* are damaged"):
        check_contents(path)


# the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "one.py").write_text("def one():\n    return 1\n" * 20)
    (folder / "two.jsonl").write_text('{"prompt": "def two():\\n", "completion": "    return 2\\n"}\n')
    (folder / "data.bin").write_bytes(b"\xff\xfe\xfd")
    return folder


def test_the_command_builds_and_checks(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = corpus.parent / "made" / "store"
    with caplog.at_level(logging.INFO, "saccade.datastore"):
        words = ["build", corpus, "--include", "*.py", "--include", "*.jsonl", "--tokenizer", DEMO, "--out", out]
        assert main(["datastore", *map(str, words)]) == 0
        assert main(["datastore", "check", str(out), "--tokenizer", DEMO]) == 0
    said = caplog.messages
    tokenizer = demo_tokenizer()
    store = Datastore.open(out)
    store.check_vocabulary(tokenizer, out)
    texts = [(corpus / "one.py").read_text(), "def two():\n    return 2\n"]
    expected = [id for text in texts for id in (*tokenizer.encode(text, False), tokenizer.vocab_size)]
    assert store.tokens.tolist() == expected
    assert said[0].startswith(f"sorting {len(expected)} tokens, in ")
    assert said[1].startswith(f"written to {out}: 2 documents, {len(expected)} tokens, ")
    assert said[2].startswith(f"{out} is whole: 2 documents")


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line in which the command ends."""
    assert main(["datastore", *map(str, words)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("saccade: ")
    assert len(said.splitlines()) == 1
    return said


def test_what_the_command_refuses(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpus.parent / "store"
    rest = ("--tokenizer", DEMO, "--out", out)
    said = failure(capsys, "build", corpus, *rest)
    assert f"{corpus / 'data.bin'} is not UTF-8 text: byte 0 is 0xff" in said
    assert "--include" in said
    assert "there is no corpus" in failure(capsys, "build", corpus / "three.py", *rest)
    (corpus / "empty.txt").touch()
    assert "the corpus holds no text" in failure(capsys, "build", corpus / "empty.txt", *rest)
    words = ("build", corpus / "one.py", "--tokenizer", DEMO)
    assert f"--out {corpus} is a folder; name a file" in failure(capsys, *words, "--out", corpus)
    assert "cannot be written" in failure(capsys, *words, "--out", corpus / "one.py" / "store")
    assert "there is no folder" in failure(capsys, "build", corpus / "one.py", "--tokenizer", "./none", "--out", out)
    assert "there is no datastore" in failure(capsys, "check", out)
    assert "is no datastore" in failure(capsys, "check", corpus / "one.py")
    written(out, [[1, 2]])
    assert "built for another tokenizer" in failure(capsys, "check", out, "--tokenizer", DEMO)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "COMMAND"),
        ("make", "invalid choice: 'make'"),
        ("build --tokenizer m --out o", "CORPUS"),
        ("build c --out o", "--tokenizer"),
        ("build c --tokenizer m", "--out"),
        ("build c --tokenizer m --out o --exclude x", "unknown argument --exclude: "),
        ("build c --tokenizer m --out o --inclde x", "did you mean '--include'"),
        ("check", "PATH"),
        ("check a b", "unexpected argument 'b'"),
    ],
)
def test_wrong_command_lines(line: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(line.split())
    assert ended.value.code == 2
    assert part in capsys.readouterr().err
