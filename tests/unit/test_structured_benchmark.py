"""What is made of measurements under schemas: the corpus as it is read, tables, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import structured, structured_page
from benchmarks.documents import Document
from benchmarks.structured import load_schemas
from benchmarks.structured_tables import rate, structured_text
from decoding.errors import ConfigError
from tests.unit.test_speed_results import SESSION


def counts(ids: int, steps: int, forced: int = 0, seconds: float = 1.0) -> dict[str, Any]:
    return {"ids": ids, "steps": steps, "forced": forced, "seconds": seconds, "reason": "stop"}


def piece(name: str, level: int, *, complaint: str | None = None, same: bool = True) -> dict[str, Any]:
    return {
        **{"name": name, "level": level, "temperature": 0.0, "complaint": complaint, "same": same, "session": 0},
        "answers": {"plain": counts(40, 40, 0, 0.2), "forced": counts(40, 20, 15), "drafters": counts(40, 10, 15)},
        "free": {"plain": counts(40, 40, 0, 0.1), "forced": counts(40, 40), "drafters": counts(40, 16)},
    }


def test_rates_and_shares_stand_in_the_table() -> None:
    pieces = [piece("const/a", 1), piece("object/b", 3)]
    assert rate(pieces, "answers", "drafters") == 4.0
    text = structured_text(pieces)
    rows = {line.split()[0]: line.replace("|", " ").split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["scalars"] == ["1", "40", "1.00", "2.00", "4.00", "1.00", "2.50", "38%"]
    assert rows["all"] == ["2", "80", "1.00", "2.00", "4.00", "1.00", "2.50", "38%"]
    assert "2 of 2 answers are complete" in text
    assert "5.00 ms with a grammar, and 2.50 ms without" in text


def test_what_is_wrong_is_named() -> None:
    text = structured_text([piece("const/a", 1, complaint="too long"), piece("object/b", 3, same=False)])
    assert "1 of 2 answers are complete" in text
    assert "const/a: too long" in text
    assert "object/b: other tokens" in text


def test_the_corpus_can_be_thinned() -> None:
    everything = load_schemas(structured.SCHEMAS, None)
    part = load_schemas(structured.SCHEMAS, 30)
    assert len(part) == 30
    assert {schema.level for schema in part} == {schema.level for schema in everything}


def test_files_that_hold_no_schemas(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--schemas"):
        load_schemas(tmp_path / "none.jsonl", None)
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(ConfigError, match="holds no schemas"):
        load_schemas(tmp_path / "other.jsonl", None)


def test_the_page_is_filled_between_its_marks(tmp_path: Path) -> None:
    page, result = tmp_path / "page.md", tmp_path / "result.json"
    page.write_text(f"# Title\n\n{structured_page.MARKS.begin}\nold\n{structured_page.MARKS.end}\nrest\n")
    Document(structured.KIND, [SESSION], [piece("const/a", 1)]).save(result)
    assert structured_page.main([str(result), "--out", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("# Title")
    assert text.endswith("rest\n")
    assert "1 of 1 answers are complete" in text


def test_pages_and_results_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"kind": "matrix", "sessions": [], "pieces": []}))
    assert structured_page.main([str(result), "--out", str(tmp_path / "page.md")]) == 1
    assert "no results for this page" in capsys.readouterr().err
    Document(structured.KIND, [SESSION], [piece("const/a", 1)]).save(result)
    (tmp_path / "page.md").write_text("# Title\n")
    assert structured_page.main([str(result), "--out", str(tmp_path / "page.md")]) == 1
    assert "no place for measurements" in capsys.readouterr().err
