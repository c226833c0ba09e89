"""The texts of a datastore: text files, folders of them, and JSONL, read piece by piece."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from decoding.errors import ConfigError

PIECE = 2**20  # bytes of a text file that are handled at once
# of UTF-8: a byte that is not the first of its character, the bits that say so, bytes of a character at most
_CONTINUES, _BYTE_MASK, _LONGEST = 0x80, 0xC0, 4


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one: text or token ids."""

    text: str
    token_ids: tuple[int, ...] = ()
    ends: bool = True  # the document ends here
    read: int = 0  # bytes of its file
    place: str = ""  # file and line, for messages


def find_files(corpus: Iterable[Path], include: Sequence[str] = ()) -> list[Path]:
    """The files of a corpus: those named, and those within folders, in order. Hidden ones are left out.

    Args:
        include: patterns such as ``*.py``; of the files within folders only those whose name fits one of them.

    Raises:
        ConfigError: a path that is not there, or a folder without such files.
    """
    found: dict[Path, None] = {}  # a set that keeps its order
    for path in corpus:
        if path.is_dir():
            inside = list(_inside(path, include))
            if not inside:
                which = f" that fit {' or '.join(include)}" if include else ""
                raise ConfigError(f"the folder {path} has no files{which}; give text files, JSONL, or folders of them")
            found |= dict.fromkeys(inside)
        elif path.exists():
            found[path] = None
        else:
            raise ConfigError(f"there is no corpus {path}; give text files, JSONL, or folders of them")
    return list(found)


def read_pieces(path: Path, piece: int = PIECE) -> Iterator[Piece]:
    """The text of a file. A .jsonl file has a document in each line, any other file is one document.

    A line has "text", or "prompt" with or without "completion", or "token_ids".

    Args:
        piece: bytes of a text file that are read at once; the pieces end with lines where lines are that short.

    Raises:
        ConfigError: a file that cannot be read, that is no UTF-8, or a line that is malformed.
    """
    try:
        with path.open("rb") as file:
            yield from _documents(file, path) if path.suffix == ".jsonl" else _text(file, path, piece)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); mend that, or leave it out") from error


def _inside(folder: Path, include: Sequence[str]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and (not include or any(fnmatch(name, pattern) for pattern in include)):
                yield Path(place, name)


def _text(file: BinaryIO, path: Path, piece: int) -> Iterator[Piece]:
    offset, rest = 0, b""
    while data := file.read(piece):
        whole = rest + data
        cut = _cut(whole)
        yield Piece(_decoded(whole[:cut], path, offset), ends=False, read=len(data))
        offset, rest = offset + cut, whole[cut:]
    yield Piece(_decoded(rest, path, offset))


def _cut(data: bytes) -> int:
    """Where a piece of text should end: after its last line, else before its last character, which may not be whole."""
    if line := data.rfind(b"\n") + 1:
        return line
    for back in range(1, min(_LONGEST, len(data)) + 1):
        if data[-back] & _BYTE_MASK != _CONTINUES:
            return len(data) - back
    return len(data)


def _decoded(data: bytes, path: Path, offset: int) -> str:
    """The text of bytes that stand at ``offset`` in a file."""
    skipped = len(codecs.BOM_UTF8) if offset == 0 and data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: byte {offset + skipped + error.start} is 0x{data[skipped + error.start]:02x} "
            f"({error.reason}); convert it, or leave it out (of folders, --include '*.py' takes certain files only)"
        ) from error


def _documents(file: BinaryIO, path: Path) -> Iterator[Piece]:
    offset = 0
    for number, line in enumerate(file, start=1):
        text = _decoded(line, path, offset)
        offset += len(line)
        if text.strip():
            yield _document(text, f"{path}, line {number}", len(line))


def _document(line: str, place: str, read: int) -> Piece:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is no JSON ({error}); every line of a .jsonl file is one object") from error
    if isinstance(entry, dict):
        ids = entry.get("token_ids")
        if isinstance(ids, list) and all(type(i) is int for i in ids):
            return Piece("", tuple(ids), read=read, place=place)
        parts = [entry["text"]] if "text" in entry else [entry.get("prompt"), entry.get("completion", "")]
        if ids is None and all(isinstance(part, str) for part in parts):
            return Piece(_valid("".join(parts), place), read=read, place=place)
    raise ConfigError(
        f'{place} has no usable "text", "prompt" or "token_ids"; give one of them as text or a list of ids'
    )


def _valid(text: str, place: str) -> str:
    """JSON can spell halves of characters, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise ConfigError(f"{place} has a lone surrogate ({wrong}), which is no character; mend the line") from error
    return text
