"""Datastores for tests: made in memory by the plainest of sorts, and one for the demo target."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from decoding.datastore.build import encoded, write
from decoding.datastore.corpus import find_files, read_pieces
from decoding.datastore.layout import Datastore, Vocabulary
from tests.engines import ROOT, demo_tokenizer


def stored(documents: Sequence[Sequence[int]], ids: int, token_kind: str = "<u2", place_kind: str = "<i4") -> Datastore:
    """What ``saccade datastore build`` would make of these documents, the vocabulary having so many ids."""
    tokens = [token for document in documents for token in (*document, ids)]
    suffixes = sorted(range(len(tokens)), key=lambda place: tokens[place:])
    starts = np.concatenate([[0], np.bincount(tokens, minlength=ids + 1).cumsum()])
    arrays = np.array(tokens, token_kind), starts.astype("<i8"), np.array(suffixes, place_kind)
    return Datastore(Vocabulary("test", ids, ""), *arrays)


@cache
def demo_datastore() -> Path:
    """One of the demo's prompts, for its target."""
    folder = Path(tempfile.mkdtemp(prefix="datastore-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    files = find_files([ROOT / "demo/prompts.jsonl"])
    pieces = (piece for file in files for piece in read_pieces(file))
    path, tokenizer = folder / "demo.datastore", demo_tokenizer()
    write(path, encoded(pieces, tokenizer), Vocabulary.of(tokenizer, "demo"))
    return path
