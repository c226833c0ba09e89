"""Settings of llama.cpp's server that are tried, so that it is measured at its best.

Of its ways to speculate (``llama-server --help``, ``--spec-type``), these need nothing but a target, or a target and
a small Llama model: draft-simple, and ngram-simple, -map-k, -map-k4v, -mod and -cache. The others (draft-eagle3, -mtp,
-dflash, -dspark) take trained heads in formats of their own, and are not tried. Its own n-gram defaults (12 equal
tokens, then 48 drafted) are for long rewrites; shorter ones are tried as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Speculation:
    """A way to speculate, as words of the command line."""

    label: str
    flags: tuple[str, ...]
    drafts: bool = False  # needs the draft model
    remembers: bool = False  # keeps n-grams of earlier requests, so that a repeated prompt is known by heart


@dataclass(frozen=True)
class LlamaSetting:
    """How the server is started."""

    threads: int
    flash_attention: bool = True
    ubatch: int = 512  # tokens of a prompt computed at once
    backend_sampling: bool = False
    speculation: Speculation | None = None

    @property
    def label(self) -> str:
        words = [f"threads={self.threads}", f"flash={'on' if self.flash_attention else 'off'}", f"ubatch={self.ubatch}"]
        words += ["backend-sampling"] if self.backend_sampling else []
        words += [self.speculation.label] if self.speculation else []
        return " ".join(words)

    @property
    def flags(self) -> list[str]:
        """Words of the command line."""
        words = ["--threads", str(self.threads), "--threads-batch", str(self.threads)]
        words += ["--flash-attn", "on" if self.flash_attention else "off", "--ubatch-size", str(self.ubatch)]
        words += ["--backend-sampling"] if self.backend_sampling else []
        return words + list(self.speculation.flags if self.speculation else ())


def machine_settings(threads: int) -> list[LlamaSetting]:
    """Plain decoding: threads and flash attention, each with each; the first is what one would take untried."""
    counts = sorted({1, threads}, reverse=True)
    return [LlamaSetting(count, flash) for count in counts for flash in (True, False)]


def prompt_settings(best: LlamaSetting) -> list[LlamaSetting]:
    """Plain decoding: the best so far, with other batches for prompts and with sampling inside the graph."""
    return [best, replace(best, ubatch=128), replace(best, ubatch=2048), replace(best, backend_sampling=True)]


def speculating(best: LlamaSetting, ways: Iterator[Speculation]) -> list[LlamaSetting]:
    """The best plain setting with each of these ways to speculate."""
    return [replace(best, speculation=way) for way in ways]


def draft_ways() -> Iterator[Speculation]:
    """With a draft model: how many tokens at most, and how sure it must be of each. What tuning found comes first."""
    for tokens in (6, 3, 2, 4, 8, 16):
        for least in (0.4, 0.0, 0.75):
            yield draft_way(tokens, least)


def draft_way(tokens: int, least: float) -> Speculation:
    flags = ("--spec-type", "draft-simple", *_draft_limits(tokens, least))
    return Speculation(f"draft-simple n-max={tokens} p-min={least:g}", flags, drafts=True)


def ngram_ways() -> Iterator[Speculation]:
    """Without a model: how many tokens must be equal, and how many are then drafted. What tuning found comes first."""
    for kind in ("ngram-map-k", "ngram-map-k4v"):
        for equal, drafted in ((3, 4), (2, 4), (4, 16), (12, 48)):
            yield ngram_way(kind, equal, drafted, remembers=True)
    for equal, drafted in ((3, 8), (2, 4), (3, 4), (4, 16), (12, 48)):
        yield ngram_way("ngram-simple", equal, drafted)
    for match, least, most in ((4, 1, 8), (8, 2, 16), (24, 48, 64)):
        flags = ["--spec-type", "ngram-mod"]
        for flag, value in (("match", match), ("min", least), ("max", most)):
            flags += [f"--spec-ngram-mod-n-{flag}", str(value)]
        yield Speculation(f"ngram-mod match={match} min={least} max={most}", tuple(flags), remembers=True)
    yield Speculation("ngram-cache", ("--spec-type", "ngram-cache"), remembers=True)


def ngram_way(kind: str, equal: int, drafted: int, *, remembers: bool = False) -> Speculation:
    flags = ("--spec-type", kind, f"--spec-{kind}-size-n", str(equal), f"--spec-{kind}-size-m", str(drafted))
    return Speculation(f"{kind} n={equal} m={drafted}", flags, remembers=remembers)


def both_ways(draft: Speculation, ngram: Speculation) -> Speculation:
    """A draft model and n-grams together; the server prefers n-grams where they have something to say."""
    kinds = f"{draft.flags[1]},{ngram.flags[1]}"
    flags = ("--spec-type", kinds, *draft.flags[2:], *ngram.flags[2:])
    return Speculation(f"{draft.label} + {ngram.label}", flags, drafts=True, remembers=ngram.remembers)


def _draft_limits(tokens: int, least: float) -> tuple[str, ...]:
    return "--spec-draft-n-max", str(tokens), "--spec-draft-p-min", f"{least:g}"
