"""The tables of an acceptance report, aligned for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from benchmarks.acceptance_runs import RANKS, REPLAY, Measured, Oracle, Variant
from benchmarks.rates import Counts, Estimate, by_depth, conditional, gain, tokens_per_step
from benchmarks.report import table

Rows = Sequence[Sequence[str]]
TYPICAL = partial(Variant, coupled=False, rule="typical")

LEGEND = """\
tokens per step: accepted drafted tokens and the bonus, over steps; ± is one standard error over the texts. The prompt's
own step does not count, nor do steps that the end of a text cut short. coupled: drafters guess with the noise that the
target draws with (the default); uncoupled: they do not. typical: Medusa's lossy rule, another text than the exact
rule's. pruned: nodes below the engine's default probability are left out, as in serving; elsewhere none are.
replay: drafters propose at every position of real text and are scored against it, uncoupled."""
LEGEND_DEPTH = """\
Share of steps that accept at least so many drafted tokens; below, the share among steps that accept one token less."""
LEGEND_ORACLE = """\
Share of positions whose right token is among the drafter's k best guesses at a depth, given that the path so far was
right. Tokens per step if every position were a step's: own trees, those that the drafter proposed; static tree, the
best one of that size over these ranks, chosen with hindsight; every node 8, a tree as deep as the drafter guesses in
which every node has the 8 best children: no tree of such children does better."""


def render(source: dict[str, Any], measured: Sequence[Measured], oracles: Sequence[Oracle], *, markdown: bool) -> str:
    """The whole report."""
    lay = _markdown if markdown else table
    settings = source["settings"]
    parts = [_heading(source)]
    same, total = same_texts(measured)
    parts += ["Tokens per step", lay(overview(measured)), LEGEND]
    parts.append(f"Whatever drafted, coupled or not, the exact rule made the same text: {same} of {total} texts.")
    if any(m.variant.temperature > 0 for m in measured):
        parts += ["Coupled, uncoupled, typical", lay(comparison(measured))]
    parts += ["Acceptance by depth", lay(depths(measured, settings["max_depth"])), LEGEND_DEPTH]
    if oracles:
        parts += ["Oracle bound", lay(bounds(oracles, settings["nodes"])), LEGEND_ORACLE]
    if markdown:
        parts = [f"## {part}" if part in HEADINGS else part for part in parts]
    return "\n\n".join(parts) + "\n"


HEADINGS = ("Tokens per step", "Coupled, uncoupled, typical", "Acceptance by depth", "Oracle bound")


def overview(measured: Sequence[Measured]) -> Rows:
    """Tokens per step of every set of drafters, coupled and exact, by temperature; and on real text."""
    texts = dict.fromkeys(m.text for m in measured if m.variant == Variant(m.variant.temperature))
    rows = [["drafters", *texts]]
    for name in _names(measured):
        rows.append([name, *(_cell(tokens_per_step(_counts(measured, name, text))) for text in texts)])
    return rows


def comparison(measured: Sequence[Measured]) -> Rows:
    """What coupling, the typical rule and pruning make of tokens per step."""
    rows = [["drafters", "", "coupled", "uncoupled", "coupled / uncoupled", "typical", "pruned", "nodes", "pruned"]]
    for name in _names(measured):
        for t in temperatures(measured):
            found = [
                _counts(measured, name, variant.label)
                for variant in (
                    Variant(t),
                    Variant(t, coupled=False),
                    TYPICAL(t),
                    Variant(t, pruned=True),
                )
            ]
            coupled, uncoupled, *_ = found
            cells = [_cell(tokens_per_step(counts)) for counts in found]
            cells.insert(2, _cell(gain(coupled, uncoupled)))
            nodes = [_nodes(measured, name, variant.label) for variant in (Variant(t), Variant(t, pruned=True))]
            rows.append([name, f"T={t:g}", *cells, *nodes])
    return rows


def depths(measured: Sequence[Measured], deepest: int) -> Rows:
    """P(at least d accepted), and the same given d - 1; uncoupled and typical at the highest temperature alone."""
    rows = [["drafters", "text", "P", *(str(d) for d in range(1, deepest + 1))]]
    shown = [Variant(t) for t in temperatures(measured)]
    if shown[-1].temperature > 0:
        shown += [Variant(shown[-1].temperature, coupled=False), TYPICAL(shown[-1].temperature)]
    for m in measured:
        if m.text != REPLAY and m.variant not in shown:
            continue
        for kind, found in (("", by_depth(m.counts)), ("given", conditional(m.counts))):
            known = [_share(e.value) for e in found if e.value > 0]
            rows.append([m.drafters, m.text, kind, *known, *["-"] * (deepest - len(known))])
    return rows


def bounds(oracles: Sequence[Oracle], nodes: int) -> Rows:
    """Top-k accuracies by depth, and what trees could reach."""
    deepest = max(len(oracle.top[1]) for oracle in oracles)
    heads = ["drafter", "text", "k", *(str(d) for d in range(1, deepest + 1))]
    rows = [[*heads, "own trees", f"static tree of {nodes}", "every node 8"]]
    for oracle in oracles:
        for k in RANKS:
            shares = [_share(value) for value in oracle.top[k]]
            last = (
                [_cell(oracle.reached), f"{oracle.tree:.2f}", f"{oracle.full:.2f}"] if k == RANKS[0] else ["", "", ""]
            )
            rows.append([oracle.drafter, oracle.text, str(k), *shares, *["-"] * (deepest - len(shares)), *last])
    return rows


def temperatures(measured: Iterable[Measured]) -> list[float]:
    """Of the texts that were made, rising."""
    return sorted({m.variant.temperature for m in measured if m.text != REPLAY})


def same_texts(measured: Iterable[Measured]) -> tuple[int, int]:
    """Texts under the exact rule that equal those of the first measurement at their temperature, of how many."""
    first: dict[float, tuple[tuple[int, ...], ...]] = {}
    same = total = 0
    for m in measured:
        if not m.tokens or m.variant.rule != "exact":
            continue
        if m.variant.temperature in first:
            same += sum(ours == theirs for ours, theirs in zip(m.tokens, first[m.variant.temperature], strict=True))
            total += len(m.tokens)
        else:
            first[m.variant.temperature] = m.tokens
    return same, total


def _names(measured: Iterable[Measured]) -> list[str]:
    return list(dict.fromkeys(m.drafters for m in measured))


def _counts(measured: Sequence[Measured], name: str, text: str) -> Sequence[Counts]:
    return next((m.counts for m in measured if m.drafters == name and m.text == text), ())


def _nodes(measured: Sequence[Measured], name: str, text: str) -> str:
    return next((f"{m.nodes:.1f}" for m in measured if m.drafters == name and m.text == text), "-")


def _cell(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def _share(value: float) -> str:
    return f"{value:.2f}"


def _markdown(rows: Rows) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def _heading(source: dict[str, Any]) -> str:
    settings, packages = source["settings"], source["packages"]
    commit = (source["commit"] or "no commit")[:12] + (" with changes" if source["dirty"] else "")
    return (
        f"    {source['command']}\n\n"
        f"{source['date']}, commit {commit}, torch {packages['torch']}, {' '.join(source['dtypes'].values())}, "
        f"{source['cpu']}. {settings['prompts']} prompts, {settings['tokens']} tokens in all; {settings['replayed']} "
        f"texts replayed. Trees of up to {settings['nodes']} nodes and depth {settings['max_depth']}."
    )
