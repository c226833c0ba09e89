"""Prompts that make a model copy, from source files and prose: the lines of benchmarks/workloads.

Made for small base models: nothing is asked in words alone. A pattern is shown with its end, then begun again, and
going on with it is copying. Pure functions: the same texts give the same lines, on every machine.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]

TOKEN = 4  # characters; most tokenizers make more tokens of code, so answers end a little before their originals
EDITED = (250, 700)  # characters of a class or function that is edited
GIVEN = 0.2  # of an edited text stands in the prompt
WORKED_ON = (400, 1200)  # characters of a class up to the method that an agent is to write
STEPS = 6  # requests of an agent's session
AGENT_TOKENS = 96  # of each of its answers
PASSAGE = (200, 480)  # characters
SHOWN = 3  # passages in a prompt
WIDTH = 88  # of a passage's lines
FRESH = ("own_{}", "given_{}", "current_{}", "inner_{}", "whole_{}")  # what names are changed to

QUOTING = '"""Answers quote the passages word for word."""\n\n'


@dataclass(frozen=True)
class Chunk:
    """A top-level class or function of a source file."""

    path: str
    name: str
    text: str  # whole lines
    written: str  # those before the body of its last method; "" of a function


@dataclass(frozen=True)
class Passage:
    """A paragraph of a page."""

    page: str
    heading: str  # under which it stands
    text: str  # in lines of WIDTH


def source_chunks(sources: Mapping[str, str]) -> Iterator[Chunk]:
    """All top-level classes and functions, file by file."""
    for path in sorted(sources):
        lines = sources[path].splitlines(keepends=True)
        for node in ast.parse(sources[path]).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
                last = node.body[-1]
                is_method = isinstance(node, ast.ClassDef) and isinstance(last, ast.FunctionDef)
                written = lines[first : last.body[0].lineno - 1] if is_method else []
                yield Chunk(path, node.name, "".join(lines[first : node.end_lineno]), "".join(written))


def frequent_names(code: str, least: int, shown: str) -> list[str]:
    """Variables and parameters of some code, most frequent first.

    Names that every program has, and those of three letters and fewer, are left out.

    Args:
        least: times that they stand in ``shown``, a part of the code, at the least.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name | ast.arg):
            names.add(node.id if isinstance(node, ast.Name) else node.arg)
    names -= {"self", *dir(builtins)}
    fit = [name for name in names if len(name) > 3 and name.islower()]
    counts = {name: len(_whole(name).findall(shown)) for name in fit}
    often = [name for name, count in counts.items() if count >= least]
    return sorted(often, key=lambda name: (-counts[name], name))


def renamed(code: str, old: str, new: str) -> str:
    """The same with a name changed wherever it stands, in comments too; lines stay lines."""
    return _whole(old).sub(new, code)


def _whole(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(name)}\b")


# code editing --------------------------------------------------------------------------------------------------------


def code_editing(chunks: Iterable[Chunk]) -> Iterator[Line]:
    """A class or function is printed, once more after a rename, and again after another one: that is the answer, and
    ``prediction`` is how it was before. Chunks that are too long or short, or lack two names to change, are left out.
    """
    for chunk in chunks:
        names = _to_rename(chunk)
        if _within(chunk.text, EDITED) and len(names) > 1:
            yield _edit(chunk, names[1], names[0])


def _to_rename(chunk: Chunk) -> list[str]:
    """Names that occur twice, and early enough to be shown changed in what is given."""
    half = chunk.text[: len(chunk.text) // 2]
    return [name for name in frequent_names(chunk.text, 2, chunk.text) if _whole(name).search(half)]


def _edit(chunk: Chunk, first: str, second: str) -> Line:
    form = FRESH[len(chunk.text) % len(FRESH)]
    first_new, new = form.format(first), form.format(second)
    before = renamed(chunk.text, first, first_new)
    lines = renamed(before, second, new).splitlines(keepends=True)
    given = _given(lines, new)
    heads = [f"# {chunk.path}\n"]
    heads += [f"# {chunk.path}, after `{a}` became `{b}`\n" for a, b in ((first, first_new), (second, new))]
    return {
        "id": f"{chunk.path}:{chunk.name}",
        "prompt": f"{heads[0]}{chunk.text}\n\n{heads[1]}{before}\n\n{heads[2]}{''.join(lines[:given])}",
        "max_tokens": len("".join(lines[given:])) // TOKEN,
        "prediction": "".join(before.splitlines(keepends=True)[given:]),
        "rename": [second, new],
    }


def _given(lines: Sequence[str], new: str) -> int:
    """How many lines are given: a fifth of the text, and until the new name has come once."""
    least, done = GIVEN * len("".join(lines)), 0
    for number, line in enumerate(lines, start=1):
        done += len(line)
        if done >= least and new in "".join(lines[:number]):
            return number
    raise ValueError(f"{new} does not occur")


# agentic repetition --------------------------------------------------------------------------------------------------


def agentic_repetition(chunks: Iterable[Chunk]) -> Iterator[Line]:
    """Sessions of an agent, one after the other: each request has the class as it is then, after one more edit, and
    asks for the same method. Classes that are too long or short, or have too few names to change, are left out.
    """
    fit = (chunk for chunk in chunks if _within(chunk.written, WORKED_ON) and len(_edits(chunk)) == STEPS - 1)
    return (line for number, chunk in enumerate(fit) for line in _session(number, chunk))


def _edits(chunk: Chunk) -> list[tuple[str, str]]:
    """(old name, new name) of a session's edits."""
    names = frequent_names(chunk.text, 2, chunk.written)[: STEPS - 1]
    return [(name, FRESH[number].format(name)) for number, name in enumerate(names)]


def _session(number: int, chunk: Chunk) -> Iterator[Line]:
    method = chunk.written.rpartition("def ")[2].partition("(")[0]
    code, done = chunk.written, ""
    for step, (old, new) in enumerate([("", ""), *_edits(chunk)]):
        if step:
            code = renamed(code, old, new)
            done += f"# Step {step}: `{old}` became `{new}`; `{method}` still fails.\n"
        yield {
            "id": f"{chunk.path}:{chunk.name}:{step}",
            "session": number,
            "prompt": f"# Task: make `{chunk.name}.{method}` of {chunk.path} pass its tests.\n{done}\n\n{code}",
            "max_tokens": AGENT_TOKENS,
        }


# answers that quote --------------------------------------------------------------------------------------------------


def passages_of(texts: Mapping[str, str]) -> Iterator[Passage]:
    """Paragraphs of prose, file by file: of pages, and of what modules say of themselves; no lists, tables, code."""
    for path in sorted(texts):
        if path.endswith(".py"):
            said = ast.get_docstring(ast.parse(texts[path])) or ""
            yield from _paragraphs(path, Path(path).stem, said)
        else:
            yield from _paragraphs(path, "", texts[path])


def _paragraphs(path: str, heading: str, text: str) -> Iterator[Passage]:
    for block in re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).split("\n\n"):
        if block.lstrip("\n").startswith("#"):
            heading = block.strip("#\n ").splitlines()[0]
        elif re.match(r"\n*[A-Z*]", block) and not block.lstrip("\n").startswith("* "):
            prose = _prose(block)
            if _within(prose, PASSAGE):
                yield Passage(path, heading, prose)


def _prose(block: str) -> str:
    """Without links and stars, in lines of WIDTH."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", block).replace("**", "").replace('"', "'")
    return "\n".join(textwrap.wrap(plain, WIDTH, break_long_words=False, break_on_hyphens=False))


def retrieval_answers(passages: Sequence[Passage]) -> Iterator[Line]:
    """Some passages, a question that is answered with one of them, and another one, whose answer has begun: about each
    passage, among those that follow it.
    """
    for number in range(len(passages) - SHOWN + 1):
        shown = list(passages[number : number + SHOWN])
        turned = number % SHOWN  # so that it is not always the first
        yield _question([*shown[-turned:], *shown[:-turned]] if turned else shown, turned)


def _question(passages: Sequence[Passage], asked: int) -> Line:
    parts = [QUOTING]
    parts += [
        f'# {each.page}: {each.heading}\nPASSAGE_{number} = """\n{each.text}\n"""\n\n'
        for number, each in enumerate(passages, start=1)
    ]
    example, wanted = passages[(asked + 1) % SHOWN], passages[asked]
    parts.append(f'{_asks(example)}ANSWER = """\n{example.text}\n"""\n\n')
    first, _, rest = wanted.text.partition("\n")
    return {
        "id": f"{wanted.page}: {first[:40]}",
        "prompt": "".join([*parts, f'{_asks(wanted)}ANSWER = """\n{first}\n']),
        "max_tokens": len(rest) // TOKEN,
    }


def _asks(passage: Passage) -> str:
    return f"# What does {passage.page} say about: {passage.heading}?\n"


def _within(text: str, bounds: tuple[int, int]) -> bool:
    return bounds[0] <= len(text) <= bounds[1]
