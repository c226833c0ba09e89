"""Rotary frequencies against transformers' own, and what the rotation does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.families import NATIVE_FAMILIES
from models.layers.ops import TorchOps
from models.layers.rope import ROPE_KINDS, RopeConfig, rope_table, supported_len

PUBLISHED: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 1e6},
    "linear": {"rope_theta": 100_000.0, "rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_theta": 500_000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-mscale": {
        "rope_theta": 10_000.0,
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "yarn-attention": {
        "rope_theta": 10_000.0,
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 16384,
        "attention_factor": 1.25,
    },
    "dynamic": {"rope_theta": 10_000.0, "rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_theta": 10_000.0,
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(64)],
        "long_factor": [1.5 + 0.5 * i for i in range(64)],
        "original_max_position_embeddings": 4096,
    },
}


def config_of(rope: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=1024, num_attention_heads=8, max_position_embeddings=32768, rope_parameters=dict(rope)
    )


def ours(rope: dict[str, Any]) -> RopeConfig:
    return NATIVE_FAMILIES["llama"].configure(config_of(rope).to_dict()).rope


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("max_len", [2048, 60_000])
def test_frequencies_equal_those_of_transformers(name: str, max_len: int) -> None:
    config = config_of(PUBLISHED[name])
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        expected, expected_scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, expected_scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=max_len)
    inverse, scale = ROPE_KINDS[kind](ours(PUBLISHED[name]), max_len)
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=0)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings_in_config_json_read_the_same(name: str) -> None:
    """rope_parameters (transformers 5) and rope_theta beside rope_scaling with "type" or "rope_type" (before)."""
    new = {**config_of(PUBLISHED[name]).to_dict(), "rope_parameters": dict(PUBLISHED[name])}
    scaling = {key: value for key, value in PUBLISHED[name].items() if key != "rope_theta"}
    base = {key: value for key, value in new.items() if key != "rope_parameters"}
    old = {**base, "rope_theta": PUBLISHED[name]["rope_theta"], "rope_scaling": scaling or None}
    renamed = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    oldest = {**old, "rope_scaling": renamed or None}
    read = NATIVE_FAMILIES["llama"].configure
    assert read(new) == read(old) == read(oldest)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", 32768),
        ("llama3", 32768),
        ("longrope", 32768),
        ("yarn", 131072),
        ("linear", 131072),
        ("dynamic", 65536),
    ],
)
def test_the_length_that_the_scaling_is_made_for(name: str, expected: int) -> None:
    assert supported_len(ours(PUBLISHED[name])) == expected


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_frequencies_are_fixed_by_the_longest_text_served(kind: str) -> None:
    rope, device = ours(PUBLISHED[kind]), torch.device("cpu")
    short, long = (rope_table(rope, served, 64, device, torch.float32) for served in (2048, 60_000))
    longer_table = rope_table(rope, 2048, 128, device, torch.float32)
    assert not torch.equal(short, long)
    assert torch.equal(short, longer_table[:64])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_table_is_wide(dtype: torch.dtype, expected: torch.dtype) -> None:
    table = rope_table(RopeConfig(dim=8), 32, 40, torch.device("cpu"), dtype)
    assert table.shape == (40, 2, 4)
    assert table.dtype == expected


def test_rotation_keeps_dims_beyond_the_rotary_ones_and_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    table = rope_table(RopeConfig(dim=8), 64, 64, torch.device("cpu"), torch.float64)
    query, key = torch.randn(1, 2, 12, dtype=torch.float64), torch.randn(1, 2, 12, dtype=torch.float64)

    def scores(query_position: int, key_position: int) -> torch.Tensor:
        rotated = []
        for tensor, position in ((query, query_position), (key, key_position)):
            keys, values = torch.zeros(1, 2, 12, dtype=torch.float64), torch.zeros(1, 2, 12, dtype=torch.float64)
            slot, at = torch.tensor([0]), torch.tensor([position])
            result = TorchOps().rotate_and_store(tensor, tensor, tensor, table, at, slot, keys, values)
            torch.testing.assert_close(keys, result)
            torch.testing.assert_close(values, tensor)
            torch.testing.assert_close(result[..., 8:], tensor[..., 8:])
            rotated.append(result)
        return (rotated[0] * rotated[1]).sum(-1)

    torch.testing.assert_close(scores(7, 3), scores(47, 43))
    assert not torch.allclose(scores(7, 3), scores(8, 3))
