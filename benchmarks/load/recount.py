"""Tokens of servers that do not count them: of their texts, by a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.load.experiment import Measured
from benchmarks.load.records import Record


def recounted(measured: Measured, count: Callable[[str], int]) -> Measured:
    """The same, with the tokens of answers that nobody has counted; after the measurement, as it takes its time."""

    def of(record: Record) -> Record:
        if record.source != "chunks" or not record.text:
            return record
        return replace(record, output_tokens=count(record.text), source="tokenizer", text="")

    turns = tuple(replace(turn, records=tuple(of(record) for record in turn.records)) for turn in measured.turns)
    return replace(measured, turns=turns)
