"""What the pages that are written from results have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.documents import Document


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
