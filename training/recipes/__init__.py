"""The table of recipes. A recipe is one file and one line in ``RECIPES``."""

from __future__ import annotations

from collections.abc import Callable

from training.recipe import RecipeKind


def _lm() -> RecipeKind:
    from training.recipes.lm import LMOptions, build_lm

    return RecipeKind(LMOptions, build_lm, "a small language model, from scratch or trained on", needs_target=False)


RECIPES: dict[str, Callable[[], RecipeKind]] = {
    "lm": _lm,
}
