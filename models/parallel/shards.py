"""Which part of a decoder each rank holds: whole attention heads, and a share of the MLP and of the vocabulary.

Norms and the embedding are held by every rank. Where there are more ranks than K/V heads, several ranks hold the same
one, each for the query heads of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from models.checkpoint import CheckpointError, Cut
from models.config import ModelConfig
from models.parallel.ranks import Ranks


def fits(config: ModelConfig, size: int) -> bool:
    """Whether a model can be spread over so many ranks."""
    if size < 1 or config.num_heads % size or config.mlp_size % size or config.vocab_size < size:
        return False
    return config.num_kv_heads % size == 0 or size % config.num_kv_heads == 0


def check_fits(config: ModelConfig, size: int) -> None:
    """Check that a model can be spread over ``size`` ranks.

    Raises:
        CheckpointError: it cannot; the message names the sizes that can be.
    """
    if not fits(config, size):
        possible = [str(each) for each in range(1, config.num_heads + 1) if fits(config, each)]
        raise CheckpointError(
            f"--tensor-parallel-size {size} does not fit this model of {config.num_heads} attention heads, "
            f"{config.num_kv_heads} K/V heads and an MLP of {config.mlp_size}; sizes that do: {', '.join(possible)}"
        )


def part_of(config: ModelConfig, size: int) -> ModelConfig:
    """The layers of one rank of ``size``, as those of a model of their own. They must fit."""
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=max(1, config.num_kv_heads // size),
        mlp_size=config.mlp_size // size,
    )


def cuts_of(config: ModelConfig, ranks: Ranks, names: Iterable[str]) -> dict[str, Cut]:
    """What a rank holds of the weights that it does not hold whole.

    Args:
        config: of the whole model.
        names: of weights, as in ``Decoder.weights``.
    """
    if ranks.size == 1:
        return {}
    part, dim = part_of(config, ranks.size), config.head_dim
    first_kv = config.num_kv_heads * ranks.rank // ranks.size
    heads = _cut(0, ranks.rank * part.num_heads * dim, part.num_heads * dim, config.num_heads * dim)
    kv = _cut(0, first_kv * dim, part.num_kv_heads * dim, config.num_kv_heads * dim)
    mlp = _cut(0, ranks.rank * part.mlp_size, part.mlp_size, config.mlp_size)
    rows = ranks.share(config.vocab_size)
    by_layer = {"q": heads, "k": kv, "v": kv, "gate": mlp, "up": mlp}
    by_layer |= {"o": replace(heads, dim=1), "down": replace(mlp, dim=1)}
    by_layer["head"] = _cut(0, rows.start, len(rows), config.vocab_size)
    cuts = {name: by_layer.get(name.split(".")[-2]) for name in names}
    # a bias of what is summed over the ranks is not cut: rank 0 adds it
    return {name: cut for name, cut in cuts.items() if cut is not None and not (cut.dim and name.endswith(".bias"))}


def _cut(dim: int, start: int, length: int, whole: int) -> Cut:
    return Cut(dim, start, start + length, whole)
