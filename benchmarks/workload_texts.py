"""Prompts that make a model copy, from source files and prose: the lines of benchmarks/workloads.

Made for small base models with a context of 1,024 tokens: nothing is asked in words alone. A pattern is shown once
with its end, then begun again, and going on with it is copying. Pure functions: the same texts give the same lines, on
every machine.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Line = dict[str, Any]
T = TypeVar("T")

TOKEN = 4  # characters; most tokenizers make more tokens of code, so answers end a little before their originals
EDITED = (900, 1250)  # characters of a class or function that is edited
GIVEN = 0.2  # of an edited text stands in the prompt
WORKED_ON = (700, 1400)  # characters of a class up to the method that an agent is to write
STEPS = 6  # requests of an agent's session
AGENT_TOKENS = 96  # of each of its answers
PASSAGE = (300, 520)  # characters
WIDTH = 88  # of a passage's lines
FRESH = ("own_{}", "given_{}", "current_{}", "inner_{}", "whole_{}")  # what names are changed to

EDIT_EXAMPLE = '''\
# Each file is printed twice: as it was, and after one of its names was changed.

# count.py, as it was
def count(words):
    found = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return found


# count.py, after `found` became `totals`
def count(words):
    totals = {}
    for word in words:
        totals[word] = totals.get(word, 0) + 1
    return totals


'''
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


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items, evenly apart; all of them if there are no more."""
    return [items[index * len(items) // count] for index in range(count)] if count < len(items) else list(items)


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


def code_editing(chunks: Sequence[Chunk], count: int) -> list[Line]:
    """A class or function is printed again with one rename; ``prediction`` is how it was."""
    fit = [(chunk, names[0]) for chunk in chunks if _within(chunk.text, EDITED) and (names := _to_rename(chunk))]
    return [_edit(chunk, old, FRESH[number % len(FRESH)].format(old)) for number, (chunk, old) in _few(fit, count)]


def _to_rename(chunk: Chunk) -> list[str]:
    """Names that occur four times, and early enough to be shown changed in what is given."""
    half = chunk.text[: len(chunk.text) // 2]
    return [name for name in frequent_names(chunk.text, 4, chunk.text) if _whole(name).search(half)]


def _edit(chunk: Chunk, old: str, new: str) -> Line:
    before = chunk.text.splitlines(keepends=True)
    after = renamed(chunk.text, old, new).splitlines(keepends=True)
    given = _given(after, new)
    head = f"# {chunk.path}, as it was\n{chunk.text}\n\n# {chunk.path}, after `{old}` became `{new}`\n"
    return {
        "id": f"{chunk.path}:{chunk.name}",
        "prompt": EDIT_EXAMPLE + head + "".join(after[:given]),
        "max_tokens": len("".join(after[given:])) // TOKEN,
        "prediction": "".join(before[given:]),
        "rename": [old, new],
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


def agentic_repetition(chunks: Sequence[Chunk], count: int) -> list[Line]:
    """``count`` sessions of an agent, one after the other: each request has the class as it is then, after one more
    edit, and asks for the same method.
    """
    fit = [chunk for chunk in chunks if _within(chunk.written, WORKED_ON) and len(_edits(chunk)) == STEPS - 1]
    return [line for number, chunk in _few(fit, count) for line in _session(number, chunk)]


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


def page_passages(pages: Mapping[str, str]) -> Iterator[Passage]:
    """Paragraphs of prose, page by page; no lists, tables, code."""
    for page in sorted(pages):
        heading = ""
        for block in re.sub(r"^```.*?^```$", "", pages[page], flags=re.MULTILINE | re.DOTALL).split("\n\n"):
            if block.lstrip("\n").startswith("#"):
                heading = block.strip("#\n ").splitlines()[0]
            elif re.match(r"\n*[A-Z*]", block) and not block.lstrip("\n").startswith("* "):
                text = _prose(block)
                if _within(text, PASSAGE):
                    yield Passage(page, heading, text)


def _prose(block: str) -> str:
    """Without links and stars, in lines of WIDTH."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", block).replace("**", "").replace('"', "'")
    return "\n".join(textwrap.wrap(plain, WIDTH, break_long_words=False, break_on_hyphens=False))


def retrieval_answers(passages: Sequence[Passage], count: int) -> list[Line]:
    """Three passages, a question that is answered with one of them, and another one, whose answer has begun."""
    triples = [passages[first : first + 3] for first in range(0, len(passages) - 2, 3)]
    return [_question(triple, number % 3) for number, triple in _few(triples, count)]


def _question(passages: Sequence[Passage], asked: int) -> Line:
    parts = [QUOTING]
    parts += [
        f'# {each.page}: {each.heading}\nPASSAGE_{number} = """\n{each.text}\n"""\n\n'
        for number, each in enumerate(passages, start=1)
    ]
    example, wanted = passages[(asked + 1) % 3], passages[asked]
    parts.append(f'{_asks(example)}ANSWER = """\n{example.text}\n"""\n\n')
    first, _, rest = wanted.text.partition("\n")
    return {
        "id": f"{wanted.page}: {first[:40]}",
        "prompt": "".join([*parts, f'{_asks(wanted)}ANSWER = """\n{first}\n']),
        "max_tokens": len(rest) // TOKEN,
    }


def _asks(passage: Passage) -> str:
    return f"# What does {passage.page} say about: {passage.heading}?\n"


def _few(items: Sequence[T], count: int) -> Iterator[tuple[int, T]]:
    return enumerate(spread(items, count))


def _within(text: str, bounds: tuple[int, int]) -> bool:
    return bounds[0] <= len(text) <= bounds[1]
