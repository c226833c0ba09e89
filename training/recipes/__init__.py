"""The table of recipes. A recipe is one file and one line in ``RECIPES``."""

from __future__ import annotations

from collections.abc import Callable

from training.recipe import RecipeKind


def _lm() -> RecipeKind:
    from training.recipes.lm import LMOptions, build_lm

    return RecipeKind(LMOptions, build_lm, "a small language model, from scratch or trained on", needs_target=False)


def _medusa() -> RecipeKind:
    from training.recipes.medusa import MedusaOptions, build_medusa

    return RecipeKind(MedusaOptions, build_medusa, "heads on the target's last hidden state (2401.10774)")


def _draft() -> RecipeKind:
    from training.recipes.draft import DraftOptions, build_draft

    return RecipeKind(DraftOptions, build_draft, "a draft model: the target with few layers, distilled from it")


RECIPES: dict[str, Callable[[], RecipeKind]] = {
    "lm": _lm,
    "draft": _draft,
    "medusa": _medusa,
}
