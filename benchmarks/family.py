"""A target and the drafters that lie beside it: what a benchmark is pointed at by one word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Case
from decoding.drafters import DRAFTERS
from decoding.errors import ConfigError

CONFIG = "config.json"
PROMPTS = Path("demo/prompts.jsonl")


@dataclass(frozen=True)
class Family:
    """A target's folder and its drafters' folders, by the drafters' names in ``--speculate``."""

    name: str
    target: Path
    drafters: dict[str, Path]

    @classmethod
    def find(cls, folder: Path) -> Family:
        """FOLDER/target with its drafters FOLDER/draft, FOLDER/eagle3, ...; or FOLDER itself is the target.

        Raises:
            ConfigError: no model lies there.
        """
        target = folder / "target" if (folder / "target" / CONFIG).is_file() else folder
        if not (target / CONFIG).is_file():
            raise ConfigError(
                f"{folder} is no family of models: neither {target / CONFIG} nor {folder / CONFIG} is there"
            )
        drafters = {name: folder / name for name in DRAFTERS if (folder / name / CONFIG).is_file()}
        return cls(folder.resolve().name, target, drafters)

    @property
    def models(self) -> dict[str, str]:
        """What each model is for -> its folder, for a result's provenance."""
        return {"target": str(self.target), **{name: str(path) for name, path in self.drafters.items()}}

    def speculate(self, drafters: Sequence[str]) -> tuple[str, ...]:
        """``--speculate`` words from names with options: "draft:depth=4" becomes "draft=FOLDER/draft:depth=4".

        Words with a path of their own, and drafters that need none and have none here, stay as they are.

        Raises:
            ConfigError: a drafter that needs a checkpoint has none here.
        """
        return tuple(self._word(drafter) for drafter in drafters)

    def _word(self, drafter: str) -> str:
        name, colon, options = drafter.partition(":")
        if "=" in name or (name not in self.drafters and name in DRAFTERS and not DRAFTERS[name]().needs_path):
            return drafter
        if name not in self.drafters:
            have = ", ".join(self.drafters) or "none"
            raise ConfigError(
                f"the family {self.name} has no drafter {name!r} (it has: {have}); add its folder {name}/"
            )
        return f"{name}={self.drafters[name]}{colon}{options}"


def load_prompts(target: Path, count: int, longest: int, path: Path = PROMPTS) -> list[Case]:
    """The first ``count`` prompts, tokenized by the target's tokenizer, each cut to its last ``longest`` tokens.

    Raises:
        ConfigError: the file has not so many.
    """
    from decoding.text import Tokenizer

    lines = path.read_text(encoding="utf-8").splitlines()
    if count > len(lines):
        raise ConfigError(f"{path} has {len(lines)} prompts, not {count}; lower --prompts")
    tokenizer = Tokenizer.load(target)
    texts = [json.loads(line)["prompt"] for line in lines[:count]]
    return [Case(index, tuple(tokenizer.encode(text)[-longest:]), seed=index + 1) for index, text in enumerate(texts)]
