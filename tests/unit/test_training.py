"""The training core: data, schedule, checkpoints, the loop."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from decoding.text import Tokenizer
from training.checkpoint import STATE_FILE, load_state, replace_folder, save_state
from training.cli import main
from training.data import Corpus, Document, WindowSampler, read_documents
from training.errors import TrainError
from training.optim import OptimizerOptions, Optimizers, schedule
from training.recipes import RECIPES

DEMO = Path(__file__).parents[2] / "demo"
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    items: list[int]\n" * 60
SMALL = ["--layers", "1", "--hidden", "32", "--heads", "2", "--kv-heads", "1", "--mlp", "48", "--vocab-size", "280"]
RUN = ["--window", "32", "--batch", "4", "--micro-batch", "2", "--precision", "fp32", "--log-every", "1"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


def train(text: Path, out: Path, *more: str) -> int:
    return main(["lm", "--data", str(text), "--out", str(out), *SMALL, *RUN, *more])


def stream(tokens: int) -> Corpus:
    return Corpus(np.arange(tokens, dtype=np.int32), np.ones(tokens, dtype=bool))


def test_an_epoch_shows_every_token_once_and_no_validation() -> None:
    sampler = WindowSampler(stream(10_000), window=16, batch=4, seed=3)
    kept = sampler.validation()[0]
    for epoch in range(2):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        seen = np.concatenate([sampler.batch(step)[0].ravel() for step in steps])
        assert len(np.unique(seen)) == len(seen) > 0.97 * 10_000
        assert not set(seen) & set(kept.ravel())
        rows = sampler.batch(steps[0])[0]
        assert (np.diff(rows, axis=1) == 1).all()
    assert not np.array_equal(sampler.batch(0)[0], sampler.batch(sampler.steps_per_epoch)[0])


def test_windows_depend_on_seed_and_step_alone() -> None:
    first, second = (WindowSampler(stream(5000), 16, 4, seed=1) for _ in range(2))
    first.batch(0)
    assert np.array_equal(first.batch(40)[0], second.batch(40)[0])
    assert not np.array_equal(second.batch(40)[0], WindowSampler(stream(5000), 16, 4, seed=2).batch(40)[0])


def test_too_little_data_says_so() -> None:
    with pytest.raises(TrainError, match="too little"):
        WindowSampler(stream(100), window=64, batch=4, seed=0)


def test_documents_end_with_the_end_token_and_prompts_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [{"token_ids": [5, 6, 7], "prompt_tokens": 2}, {"text": "a"}, {"prompt": "b", "completion": "c"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = Tokenizer.load(DEMO / "target")
    corpus = Corpus.build(read_documents([path]), tokenizer, 0, 8192)
    ids = [*tokenizer.encode("a"), 0, *tokenizer.encode("bc"), 0]
    # text is gathered and tokenised together, after what comes as ids
    assert corpus.tokens.tolist() == [5, 6, 7, 0, *ids]
    assert corpus.counts.tolist() == [False, False, True, True] + [True] * len(ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "UTF-8"),
        (b"{broken\n", "line 1 is no JSON"),
        (b'{"text": "fine"}\n{"tokens": [1]}\n', "line 2 has no usable"),
        (b'{"text": 3}\n', "no usable"),
    ],
)
def test_bad_data_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(TrainError, match=message) as caught:
        list(read_documents([path]))
    assert str(path) in str(caught.value)


def test_ids_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(TrainError, match="another model"):
        Corpus.build([Document(token_ids=(3, 9000))], Tokenizer.load(DEMO / "target"), 0, 8192)


def test_schedule_rises_stays_and_falls() -> None:
    factors = [schedule(p, warmup=0.1, decay=0.4) for p in (0.0, 0.05, 0.1, 0.5, 0.6, 0.8, 1.0)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_muon_takes_matrices_alone() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(10, 4)
            self.inner = torch.nn.Linear(4, 4)
            self.lm_head = torch.nn.Linear(4, 10, bias=False)

    model = Model()
    muon, adamw = (part for part, _ in Optimizers(model, OptimizerOptions()).parts)
    assert [p is model.inner.weight for group in muon.param_groups for p in group["params"]] == [True]
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert rest == {id(model.embed.weight), id(model.inner.bias), id(model.lm_head.weight)}


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert train(text, tmp_path / "whole", "--steps", "8") == 0
    with pytest.raises(KeyboardInterrupt), interrupted_after(5):
        train(text, tmp_path / "parts", "--steps", "8")
    assert load_state(tmp_path / "parts" / ".train")["position"]["step"] == 5  # type: ignore[index]
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert train(text, tmp_path / "parts", "--steps", "8") == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert load_state(tmp_path / "parts" / ".train") is None
    for name in ("training.png", "training.jsonl", "tokenizer.json", "config.json"):
        assert (tmp_path / "parts" / name).is_file()


def test_the_result_is_a_model_that_serves(text: Path, tmp_path: Path) -> None:
    from models.loader import load_model

    train(text, tmp_path / "out", "--steps", "3")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (tied: stored once)
    model = load_model(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.vocab_size == Tokenizer.load(tmp_path / "out").vocab_size


def test_another_command_does_not_go_on_with_a_run(text: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), interrupted_after(2):
        train(text, tmp_path / "out", "--steps", "8")
    with pytest.raises(TrainError, match=r"lr.*--restart"):
        train(text, tmp_path / "out", "--steps", "8", "--lr", "0.5")
    assert train(text, tmp_path / "out", "--steps", "3", "--lr", "0.001", "--restart") == 0


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    save_state(tmp_path, {"step": 1})
    with limited_files(20_000), pytest.raises(TrainError, match="unharmed"):
        save_state(tmp_path, {"step": 2, "weights": torch.zeros(100_000)})
    assert load_state(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_a_full_disk_leaves_the_previous_result(tmp_path: Path) -> None:
    out = tmp_path / "heads"
    replace_folder(out, lambda folder: (folder / "a").write_bytes(b"old"))

    def write(folder: Path) -> None:
        (folder / "a").write_bytes(b"new")
        with (folder / "b").open("wb") as file:
            file.write(bytes(1_000_000))

    with limited_files(20_000), pytest.raises(TrainError, match="unharmed"):
        replace_folder(out, write)
    assert (out / "a").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads"]


def test_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(TrainError, match="damaged"):
        load_state(tmp_path)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_has_flags_of_its_own(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([recipe, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(RECIPES[recipe]().options):
        assert f"--{field.name.replace('_', '-')}" in shown


@pytest.mark.process
def test_two_processes_train_as_one_does(text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    options = ["--steps", "4", "--dtype", "float32"]
    train(text, tmp_path / "one", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training"]
    command += ["lm", "--data", str(text), "--out", str(tmp_path / "two"), *SMALL, *RUN, *options]
    done = subprocess.run(command, cwd=DEMO.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="--data"):
        main(["lm", "--out", str(tmp_path / "out"), "--init", str(DEMO / "target")])


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes: what a full disk looks like to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Ctrl-C before the step of this number, as a user's terminal would send it."""
    import signal

    from training.data import WindowSampler as Sampler

    original = Sampler.batch

    def batch(self: Sampler, step: int) -> tuple[np.ndarray, np.ndarray]:
        if step == steps:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore ctrl-C
    Sampler.batch = batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sampler.batch = original  # type: ignore[method-assign]
        signal.signal(signal.SIGINT, handler)
