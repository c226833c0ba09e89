"""Too little memory is said at the start, with the fix, not by the kernel halfway."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from decoding import memory
from decoding.engine import Engine
from decoding.errors import ConfigError, ModelError
from models.checkpoint import CheckpointError
from models.loader import load_model

TARGET = str(Path(__file__).parents[2] / "demo/target")
MIB = 2**20


def with_available(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: size)


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with_available(monkeypatch, 10 * MIB)
    with pytest.raises(ModelError, match=r"take at least 15 MiB.*has 10 MiB.*--quantization int8"):
        Engine.load(TARGET)
    with pytest.raises(CheckpointError, match="take at least"):
        load_model(Path(TARGET), room=7 * MIB)
    load_model(Path(TARGET), room=64 * MIB)


def test_the_asked_pool_counts_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with_available(monkeypatch, 100 * MIB)
    Engine.load(TARGET, kv_cache_memory=64 * MIB)
    with pytest.raises(ModelError, match=r"has 5 MiB for them.*lower --kv-cache-memory"):
        Engine.load(TARGET, kv_cache_memory=95 * MIB)
    with pytest.raises(ConfigError, match=r"pool of 101 MiB does not fit the 100 MiB.*lower --kv-cache-memory"):
        Engine.load(TARGET, kv_cache_memory=101 * MIB)


@pytest.mark.parametrize(
    ("settings", "flag"), [({"kv_cache_memory": 65 * MIB}, "--kv-cache-memory"), ({"num_pages": 9000}, "--num-pages")]
)
def test_a_pool_that_does_not_fit_beside_the_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], flag: str
) -> None:
    answers = iter([1000 * MIB, 64 * MIB])  # what is free before the weights are loaded, and after
    monkeypatch.setattr(memory, "available_memory", lambda: next(answers))
    with pytest.raises(ConfigError, match=f"does not fit the 64 MiB of memory that are free.*lower {flag}"):
        Engine.load(TARGET, **settings)


def test_a_pool_of_no_given_size_takes_what_is_there_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_available(monkeypatch, 100 * MIB)
    with caplog.at_level(logging.WARNING, logger="saccade.engine"):
        small = Engine.load(TARGET)
        (line,) = (record.getMessage() for record in caplog.records)
        caplog.clear()
        with_available(monkeypatch, None)  # nothing is known: nothing is refused, and nothing said
        whole = Engine.load(TARGET)
    assert "the K/V pool gets 80 MiB in place of 2 GiB" in line
    assert "--kv-cache-memory" in line
    assert not caplog.records
    ratio = small.stats().pages_total / whole.stats().pages_total
    assert ratio == pytest.approx(80 / 2048, rel=0.01)
