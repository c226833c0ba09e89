"""Reads docker/Dockerfile: as much of the format as that file uses."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    """One of a stage: RUN, COPY, ENV, ARG, ..."""

    verb: str
    text: str  # what follows, in one line, variables as they are written

    def words(self) -> list[str]:
        """The text as the shell splits it, or the strings of a JSON array."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


@dataclass
class Stage:
    """From one FROM to the next."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, verb: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.verb == verb]


@dataclass
class Dockerfile:
    """The arguments before the first stage, with their defaults or what was given for them, and the stages."""

    arguments: dict[str, str]
    stages: list[Stage]

    def stage(self, name: str) -> Stage:
        """The stage of that name; KeyError for an image from elsewhere."""
        return {stage.name: stage for stage in self.stages}[name]

    def lineage(self, name: str) -> list[Stage]:
        """The stages that make up the one named, oldest first."""
        known = {stage.name for stage in self.stages}
        stages = [self.stage(name)]
        while stages[0].base in known:
            stages.insert(0, self.stage(stages[0].base))
        return stages


def read(text: str, arguments: Mapping[str, str]) -> Dockerfile:
    """A Dockerfile's stages, with ``arguments`` (--build-arg) in place of the defaults."""
    known: dict[str, str] = {}
    stages: list[Stage] = []
    for verb, rest in _lines(text):
        if verb == "FROM":
            base, _, name = expand(rest, known).partition(" AS ")
            stages.append(Stage(base, name))
        elif stages:
            stages[-1].instructions.append(Instruction(verb, rest))
        else:
            assert verb == "ARG", verb
            name, _, default = rest.partition("=")
            known[name] = arguments.get(name, shlex.split(default)[0])
    return Dockerfile(known, stages)


def _lines(text: str) -> list[tuple[str, str]]:
    code = "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    joined = [re.sub(r"\s*\\\n\s*", " ", part) for part in re.split(r"(?<!\\)\n", code)]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """``text`` with $NAME and ${NAME} replaced, unknown ones by nothing, as Docker does outside RUN."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], ""), text)


def ignored(path: str, patterns: str) -> bool:
    """Whether .dockerignore keeps ``path``, relative to the root, out: the last line for it or a folder around it."""
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    answer = False
    for line in patterns.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            matches = re.compile(_pattern(pattern.removeprefix("!")))
            if any(matches.fullmatch(parent) for parent in parents):
                answer = not pattern.startswith("!")
    return answer


def _pattern(glob: str) -> str:
    parts = re.split(r"(\*\*/|\*)", glob)
    return "".join({"**/": "(?:.*/)?", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)
