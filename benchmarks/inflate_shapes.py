"""Sizes that a small model is inflated to, and the proportions that published drafters have to their targets.

The draft vocabulary of EAGLE-3 and Medusa heads is a quarter of the target's, as 32,000 of 128,256 is for Llama 3. The
draft model has half the target's width and as many layers as make it a tenth of the target, unless one is named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from decoding.errors import ConfigError
from models.config import ModelConfig

DRAFT_SHARE = 0.1  # of the target's parameters, at least
VOCABULARY_SHARE = 0.25  # of the target's vocabulary that EAGLE-3 and Medusa guess among


@dataclass(frozen=True)
class Shape:
    """A Llama model's sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool  # the LM head is the embedding

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        return cls(
            hidden=config.hidden_size,
            layers=config.num_layers,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            mlp=config.mlp_size,
            vocab=config.vocab_size,
            tied=config.tied,
        )

    @property
    def parameters(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * layer + embeddings + self.hidden

    def holds(self, smaller: Shape) -> None:
        """Check that a model of another shape can be padded to this one.

        Raises:
            ConfigError: naming what is too small or does not divide.
        """
        for name, size in asdict(smaller).items():
            if name != "tied" and getattr(self, name) < size:
                raise ConfigError(f"{name} {getattr(self, name)} is less than the small model's {size}; raise it")
        if self.head_dim % smaller.head_dim:
            raise ConfigError(f"head_dim must be a multiple of the small model's {smaller.head_dim}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} heads cannot share {self.kv_heads} K/V heads evenly; make them a multiple")
        if self.hidden % self.heads:  # transformers wants it
            raise ConfigError(f"hidden {self.hidden} is no multiple of the {self.heads} heads; change either")
        if self.tied and not smaller.tied:
            raise ConfigError("the small model has a head of its own, which tied embeddings cannot hold; say --untied")
        if self.vocab > smaller.vocab and self.hidden == smaller.hidden:
            raise ConfigError("a larger vocabulary needs a channel that the small model has not; raise hidden, too")


LLAMA_3_2_1B = Shape(2048, 16, 32, 8, 64, 8192, 128_256, tied=True)
LLAMA_3_8B = Shape(4096, 32, 32, 8, 128, 14_336, 128_256, tied=False)

TARGETS: Mapping[str, Shape] = {
    "0.3b": Shape(1024, 20, 16, 8, 64, 3072, 32_768, tied=True),
    "1b": LLAMA_3_2_1B,
    "8b": LLAMA_3_8B,
}
DRAFTS: Mapping[str, Shape] = {"8b": LLAMA_3_2_1B}  # the pair that Meta's own models make


def draft_shape(target: Shape, small: Shape) -> Shape:
    """The draft model for a target: the rule above, never less than the small draft model itself."""
    head_dim = small.head_dim
    kv_heads = max(target.hidden // 2 // head_dim * target.kv_heads // target.heads, small.kv_heads)
    group = max(target.heads // target.kv_heads, -(-small.heads // small.kv_heads))
    shape = Shape(
        hidden=max(target.hidden // 2, small.hidden),
        layers=small.layers,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=max(target.mlp // 2, small.mlp),
        vocab=target.vocab,
        tied=small.tied,
    )
    least = shape.hidden + (target.vocab > small.vocab and shape.hidden == small.hidden)
    shape = replace(shape, hidden=-(-least // shape.heads) * shape.heads)
    while shape.parameters < DRAFT_SHARE * target.parameters:
        shape = replace(shape, layers=shape.layers + 1)
    return shape


def drafted_vocabulary(target: Shape, small: int) -> int:
    """Rows of a draft vocabulary; all ``small`` tokens that are real are in it."""
    return max(small, int(VOCABULARY_SHARE * target.vocab) // 64 * 64) if target.vocab > small else small
