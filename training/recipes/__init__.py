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


def _mtp() -> RecipeKind:
    from training.recipes.mtp import MTPOptions, build_mtp

    return RecipeKind(MTPOptions, build_mtp, "a module for multi-token prediction, recursed (2509.18362)")


def _eagle() -> RecipeKind:
    from training.recipes.eagle import EagleOptions, build_eagle

    return RecipeKind(EagleOptions, build_eagle, "EAGLE-1: guesses the target's next feature (2401.15077)")


def _eagle3() -> RecipeKind:
    from training.recipes.eagle3 import Eagle3Options, build_eagle3

    return RecipeKind(Eagle3Options, build_eagle3, "EAGLE-3: drafts on features of three depths (2503.01840)")


def _early_exit() -> RecipeKind:
    from training.recipes.early_exit import EarlyExitOptions, build_early_exit

    return RecipeKind(EarlyExitOptions, build_early_exit, "an adapter after the target's first layers (early exit)")


def _layerskip() -> RecipeKind:
    from training.recipes.layerskip import LayerSkipOptions, build_layerskip

    return RecipeKind(LayerSkipOptions, build_layerskip, "the target itself, so that it can be left early (2404.16710)")


RECIPES: dict[str, Callable[[], RecipeKind]] = {
    "lm": _lm,
    "draft": _draft,
    "medusa": _medusa,
    "mtp": _mtp,
    "eagle": _eagle,
    "eagle3": _eagle3,
    "early-exit": _early_exit,
    "layerskip": _layerskip,
}
