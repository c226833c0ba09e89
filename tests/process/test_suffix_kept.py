"""What suffix decoding learned outlives the server that learned it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from decoding.drafters.suffix_file import SuffixFile, fingerprint
from tests.engines import demo_tokenizer
from tests.process.serving import Served, run, serving

pytestmark = pytest.mark.process

ASK = {"prompt": "def fib(n):\n", "max_tokens": 60, "ignore_eos": True, "seed": 4, "cache_salt": "tenant"}


def complete(server: Served) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60).json()
    return answer


def test_a_server_that_comes_back_drafts_what_it_said_before(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    options = ("demo/target", "--speculate", f"suffix={path}", "--plan", "fixed", "--kv-cache-memory", "64MiB")
    answers = []
    for _ in range(2):
        with serving(*options) as server:
            answers.append(complete(server))
            assert server.end()[0] == 0
        assert "Traceback" not in "".join(server.log)
    first, again = answers
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    assert again["usage"]["speculation"]["steps"] < first["usage"]["speculation"]["steps"] / 2
    kept = SuffixFile(str(path), fingerprint(demo_tokenizer())).read()
    assert kept is not None
    assert kept.texts[1].tolist() == [60, 60]
    path.write_bytes(path.read_bytes()[:-3])
    refused = run("serve", *options)
    assert refused.returncode != 0
    assert f"{path} has" in refused.stderr
    assert "delete it or bring back a copy" in refused.stderr
