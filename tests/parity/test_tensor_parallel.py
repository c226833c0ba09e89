"""A model on several ranks computes what it computes on one. Ranks are threads here (tests/ranks.py)."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import kernels
from models.batch import PAGE_SIZE
from models.decoder import Decoder
from models.families import NATIVE_FAMILIES
from models.layers.linear import exact_packing
from models.loader import Checkpoint, CheckpointError, load_model, read_config
from models.parallel.ranks import Ranks
from models.parallel.shards import cuts_of, part_of
from models.target import CausalModel
from tests.paged import PagedRun
from tests.parity.tiny import VARIANTS, random_prompt, save_tiny
from tests.parity.zoo import make, save
from tests.ranks import RankThreads, rank_threads

NAMES = NATIVE_FAMILIES["llama"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {variant: save_tiny(variant, root / variant) for variant in VARIANTS}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[RankThreads]:
    with rank_threads(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def two() -> Iterator[RankThreads]:
    with rank_threads(2) as started:
        yield started


class Run(PagedRun):
    """Over a cache of the model's own making, as those of several ranks need."""

    def __init__(self, model: CausalModel, rows: int = 1, capacity: int = 1024) -> None:
        super().__init__(model, rows, capacity)
        self.cache = model.new_cache(self.cache.scratch_page)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_taps_and_exits_are_those_of_one_rank(
    folders: dict[str, Path], ranks: RankThreads, variant: str
) -> None:
    whole = load_model(folders[variant], dtype="float64")
    spread = ranks.driver.load(folders[variant], dtype="float64")
    prompts = [random_prompt(53), random_prompt(3)]
    runs = Run(whole, 2), Run(spread, 2)
    theirs, ours = (run.extend(prompts, 20) for run in runs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert_close(one, other)
    assert_close(*(run.tree(0, [9, 1, 2, 3, 4], [-1, 0, 0, 1, 1]) for run in runs))
    batch = runs[0].batch({0: [9, 1, 2], 1: [5]}, {0: [-1, 0, 0]})
    taps = [run.forward(batch, (0, 1, 2)).taps for run in runs]
    for tap in (0, 1, 2):
        assert_close(taps[1][tap], taps[0][tap])
    exits = [model.exit_after(1)(batch, run.cache) for model, run in zip((whole, spread), runs, strict=True)]
    assert_close(exits[1], exits[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cpu_chunks_and_trees_do_not_change_a_bit(
    folders: dict[str, Path], ranks: RankThreads, dtype: str
) -> None:
    """As on one rank: a row's bits do not depend on where in the batch it stands, though they are summed over ranks."""
    model, prompt = ranks.driver.load(folders["llama-tied-biased"], dtype=dtype), random_prompt(70)
    if exact_packing(model.device, model.dtype) is None or not kernels.serves(model.device, model.dtype):
        pytest.skip("neither packed linears nor compiled kernels here: equal up to rounding only")
    (whole,) = Run(model).extend([prompt])
    for chunk in (1, 16, 33):
        assert torch.equal(Run(model).extend([prompt], chunk)[0], whole)
    run = Run(model)
    run.extend([prompt[:50]])
    assert torch.equal(
        run.tree(0, [prompt[50], 3, prompt[51], 7, prompt[52]], [-1, 0, 0, 1, 2])[[0, 2, 4]], whole[50:53]
    )


def test_moved_slots_move_in_all_ranks(folders: dict[str, Path], two: RankThreads) -> None:
    models = load_model(folders["qwen3"], dtype="float64"), two.driver.load(folders["qwen3"], dtype="float64")
    found = []
    for model in models:
        run = Run(model)
        run.extend([random_prompt(30)])
        run.tree(0, [9, 1, 2, 3], [-1, 0, 0, 2])  # 9, 2, 3 are accepted
        slots = [run.pages[0][key // PAGE_SIZE] * PAGE_SIZE + key % PAGE_SIZE for key in range(30, 34)]
        run.cache.move(torch.tensor(slots[2:]), torch.tensor(slots[1:3]))
        run.lengths[0] = 33
        found.append(run.extend([[5, 6]])[0])
    assert_close(found[1], found[0])


def test_caches_that_nobody_has_are_given_up(folders: dict[str, Path], two: RankThreads) -> None:
    model = two.driver.load(folders["llama"])
    (worker,) = two.workers
    gc.collect()
    Run(model).extend([[1, 2]])  # others are announced to be gone
    before = len(worker._caches)
    for _ in range(3):
        Run(model).extend([[1, 2, 3]])
    gc.collect()
    run = Run(model)
    run.extend([[1, 2, 3]])
    assert len(worker._caches) <= before


def test_ranks_add_up_to_the_model(folders: dict[str, Path], ranks: RankThreads) -> None:
    """Each rank holds its share of a layer, and reads no more from the file."""
    folder = folders["llama"]
    whole, size = load_model(folder, dtype="float64"), ranks.driver.size
    assert isinstance(whole, Decoder)
    parts = [part_of(whole.config, size)] * size
    for name, weight in whole.weights().items():
        cuts = [cuts_of(whole.config, Ranks(rank, size), [name]).get(name) for rank in range(size)]
        if cuts[0] is None:
            assert "norm" in name or name == "embed.weight"
            continue
        assert {cut.whole_shape(tuple(weight[cut.index].shape)) for cut in cuts if cut} == {tuple(weight.shape)}
        joined = torch.cat([weight[cut.index] for cut in cuts if cut], dim=cuts[0].dim)
        if parts[0].num_kv_heads * size == whole.config.num_kv_heads or name.split(".")[-2] not in ("k", "v"):
            assert torch.equal(joined, weight), name
        else:  # two ranks for each K/V head
            assert joined.shape[0] == 2 * weight.shape[0]
        theirs = NAMES.checkpoint_name(name)
        ((_, read),) = Checkpoint.open(folder).read([theirs], {theirs: cuts[1]})
        assert torch.equal(read.double(), weight[cuts[1].index])


def test_every_layout_of_checkpoints_loads(folders: dict[str, Path], two: RankThreads, tmp_path: Path) -> None:
    prompt, folder = random_prompt(20), folders["llama"]
    expected = Run(load_model(folder, dtype="float64")).extend([prompt])[0]
    sharded = save_tiny("llama", tmp_path / "sharded", max_shard_size="60KB")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(load_file(folder / "model.safetensors"), pickled / "pytorch_model.bin")
    for layout in (sharded, pickled, as_meta(folder, tmp_path / "meta")):
        assert_close(Run(two.driver.load(layout, dtype="float64")).extend([prompt])[0], expected)


def as_meta(folder: Path, out: Path) -> Path:
    """A Llama checkpoint in Meta's layout, whose heads' dims stand in pairs."""
    config = read_config(folder)
    out.mkdir()
    params = {"n_heads": config["num_attention_heads"], "n_kv_heads": config["num_key_value_heads"]}
    params |= {"norm_eps": config["rms_norm_eps"], "max_seq_len": config["max_position_embeddings"]}
    (out / "params.json").write_text(json.dumps(params))
    theirs = {}
    for stored, weight in load_file(folder / "model.safetensors").items():
        for part, heads in (("q_proj", params["n_heads"]), ("k_proj", params["n_kv_heads"])):
            if part in stored:
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        name = next(ours for ours in _META if ours in stored)
        layer = stored.split(".")[2] if ".layers." in stored else ""
        theirs[f"layers.{layer}.{_META[name]}.weight" if layer else f"{_META[name]}.weight"] = weight
    torch.save(theirs, out / "consolidated.pth")
    return out


_META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}


def test_a_vocabulary_that_does_not_divide(tmp_path: Path, two: RankThreads) -> None:
    folder = save_tiny("qwen2", tmp_path, vocab_size=251)
    prompt = random_prompt(20, vocab=251)
    expected = Run(load_model(folder, dtype="float64")).extend([prompt])[0]
    found = Run(two.driver.load(folder, dtype="float64")).extend([prompt])[0]
    assert found.shape == (20, 251)
    assert_close(found, expected)


def test_weights_of_eight_bits(folders: dict[str, Path], two: RankThreads) -> None:
    prompt = random_prompt(40)
    exact, rounded = (
        Run(load_model(folders["llama"], dtype="float32", quantization=name)).extend([prompt])[0]
        for name in ("none", "int8")
    )
    spread = Run(two.driver.load(folders["llama"], dtype="float32", quantization="int8")).extend([prompt])[0]
    # scales of what is summed over the ranks are those of their parts: it rounds otherwise, and not worse
    assert (spread - exact).abs().mean() < 1.2 * (rounded - exact).abs().mean()
    assert not torch.equal(spread, exact)


@pytest.mark.parametrize(
    ("variant", "size", "possible"),
    [("llama", 3, "1, 2, 4"), ("qwen3-sliding", 8, "1, 2, 4"), ("llama", 64, "1, 2, 4")],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(
    folders: dict[str, Path], variant: str, size: int, possible: str
) -> None:
    with pytest.raises(
        CheckpointError, match=rf"--tensor-parallel-size {size} does not fit .*sizes that do: {possible}$"
    ):
        load_model(folders[variant], ranks=Ranks(0, size))


def test_models_that_run_through_transformers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--tensor-parallel-size is for models .*llama, .*leave the flag out"):
        load_model(save(make("gpt_neox"), tmp_path), ranks=Ranks(0, 2))


def test_what_one_rank_cannot_load_is_told_and_the_others_go_on(folders: dict[str, Path], two: RankThreads) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        two.driver.load(folders["llama"] / "nothing")
    Run(two.driver.load(folders["llama"])).extend([[1, 2, 3]])


def test_the_threads_of_the_network_are_the_only_polite_ones() -> None:
    """They keep off cores that others are on; what starts them does not become so itself."""

    def policies() -> dict[str, int]:
        found = {}
        for path in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # a thread of another test, which ends
                found[path.name] = os.sched_getscheduler(int(path.name))
        return found

    before, own = policies(), os.sched_getscheduler(0)
    with rank_threads(2):
        new = {name: policy for name, policy in policies().items() if name not in before}
        assert list(new.values()).count(os.SCHED_BATCH) >= 4  # of two ranks, each with two groups
        assert os.sched_getscheduler(0) == own
