"""What the pages that are written from results have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.documents import Document
from decoding.errors import ConfigError


@dataclass(frozen=True)
class Marks:
    """Two lines of a page: what stands between them is written by a command, the rest by people."""

    begin: str
    end: str

    def write(self, page: Path, measured: str) -> None:
        """Put something else between the marks.

        Raises:
            ConfigError: a page that cannot be read, or has no such marks.
        """
        try:
            text = page.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{page} cannot be read ({error.strerror}); give a page that has the marks") from None
        page.write_text(self.replaced(text, measured, page), encoding="utf-8")

    def replaced(self, text: str, measured: str, page: Path) -> str:
        """The text of the page with something else between the marks.

        Raises:
            ConfigError: they are not there, in their order.
        """
        head, begin, rest = text.partition(self.begin)
        _, end, tail = rest.partition(self.end)
        if not begin or not end:
            lines = f"{self.begin}\n{self.end}"
            raise ConfigError(f"{page} has no place for measurements; write these two lines into it:\n{lines}")
        return f"{head}{self.begin}\n\n{measured}\n\n{self.end}{tail}"


def indented(text: str) -> str:
    """A block that Markdown leaves as it is."""
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


def sources(documents: Iterable[Document]) -> list[str]:
    """Every session of the documents: how to do it again."""
    return [_source(session) for document in documents for session in document.sessions]


def _source(session: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in session["packages"].items())
    commit = (session["commit"] or "no commit")[:12] + (" with changes" if session["dirty"] else "")
    models = ", ".join(f"{name} {(model['sha256'] or '-')[:12]}" for name, model in session["models"].items())
    load = ", ".join(f"{value:.1f}" for value in session["load_average"])
    return indented(
        f"{session['command']}\n"
        f"{session['date']}, commit {commit}, Python {session['python']}, {packages}\n"
        f"{session['cpu']}, {session['cores_allowed']} cores, {session['threads']} threads, load average {load}\n"
        f"dtypes {' and '.join(sorted(set(session['dtypes'].values())))}; models (SHA-256): {models}"
    )
