"""What ``saccade train`` answers: to wrong words, to what cannot work, and to ctrl-C."""

from __future__ import annotations

import dataclasses
import errno
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decoding.errors import SaccadeError
from tests.parity.tiny import save_tiny
from training.arguments import OPTION_GROUPS, parse
from training.checkpoint import load_state
from training.cli import main
from training.data import Corpus, Document, WindowSampler
from training.errors import TrainError
from training.optim import OptimizerOptions
from training.recipe import Losses, Windows
from training.recipes import RECIPES
from training.tokenizer import train_tokenizer
from training.trainer import RunOptions, Trainer

TEXT = "def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n" * 40
CONTEXT = 64
RUN = ["--window", "16", "--batch", "2", "--micro-batch", "2", "--steps", "2", "--precision", "fp32", "--device", "cpu"]
LM = ["--layers", "1", "--hidden", "32", "--heads", "2", "--kv-heads", "1", "--mlp", "48", "--vocab-size", "280"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("target"), vocab_size=280, max_position_embeddings=CONTEXT)
    train_tokenizer([Document(TEXT)], 280, folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


def refused(*words: Any) -> str:
    """The one line in which a command ends that cannot work."""
    with pytest.raises(SaccadeError) as raised:
        main([str(word) for word in words])
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "RECIPE"),
        ("medsa", "did you mean 'medusa'?"),
        ("medusa", "--target, --out"),
        ("medusa --target t --out o --head 3", "did you mean '--heads'?"),
        ("medusa --target t --out o --kv-heads 3", "unknown argument --kv-heads"),
        ("medusa --target t --out o extra", "unexpected argument 'extra'"),
        ("medusa --target t --out o --heads x", "--heads"),
        ("medusa --target t --out o --window 0", "at least 8"),
        ("medusa --target t --out o --distill-tokens 0", "at least 1"),
        ("medusa --target t --out o --seed -1", "at least 0"),
        ("lm --out o --vocab-size 5", "at least 263"),
        ("lm --out o --betas 0.9", "--betas"),
        ("lm --out o --precision fp8", "bf16"),
    ],
)
def test_wrong_command_lines(line: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(line.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert part in said
    assert len(said.splitlines()) == 1
    assert "--help" in said


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_flag_has_a_help_text(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([recipe, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for field in (each for group in (RECIPES[recipe]().options, *OPTION_GROUPS.values()) for each in fields(group)):
        flag = f"--{field.name.replace('_', '-')}"
        shown = re.search(rf" {flag}( [NXV]\w*)*(, --no-\S+)? (?P<text>[^-\s].*?)( --|$)", said)
        assert shown, flag
        if type(field.default) in (int, float):
            assert f"(default: {field.default})" in shown["text"], flag
    assert "Options:" not in said  # names of classes mean nothing to users


def fields(options: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(options)


def test_defaults_of_the_command_line_are_those_of_the_options() -> None:
    args = parse(["eagle3", "--target", "t", "--out", "o"])
    for group in (RECIPES["eagle3"]().options, *OPTION_GROUPS.values()):
        given = group(**{field.name: getattr(args, field.name) for field in fields(group)})
        assert given == group()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--window 65", f"lower --window to {CONTEXT}"),
        ("--device gpu", "use cpu, cuda"),
        ("--device meta", "use cpu, cuda"),
        ("--betas 2 3", "--betas"),
        ("--clip -1", "--clip"),
        ("--lr nan", "--lr"),
        ("--heads 0", "--heads"),
        ("--steps 0", "--steps"),
        ("--init nowhere", "--init nowhere"),
    ],
)
def test_options_that_cannot_work(words: str, part: str, target: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert part in refused("medusa", "--target", target, "--data", text, "--out", out, *RUN, *words.split())
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--layers 0", "--layers must be at least 1"),
        ("--heads 0", "--heads must be at least 1"),
        ("--heads 3", "multiple of --heads"),
        ("--dtype int8", "--dtype must be one of"),
        ("--context 8", "raise --context"),
    ],
)
def test_models_that_cannot_be(words: str, part: str, text: Path, tmp_path: Path) -> None:
    assert part in refused("lm", "--data", text, "--out", tmp_path / "out", *LM, *RUN, *words.split())


def test_files_that_cannot_be_used(target: Path, text: Path, tmp_path: Path) -> None:
    def said(*words: Any) -> str:
        given = {"--target": target, "--data": text, "--out": tmp_path / "out"}
        given |= dict(zip(words[::2], words[1::2], strict=True))
        line = [word for pair in given.items() for word in pair if pair[1] is not None]
        return refused("medusa", *line, *RUN)

    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("abc")
    assert "no folder" in said("--target", tmp_path / "nowhere")
    assert "has no config.json" in said("--target", tmp_path / "empty")
    assert "No such file" in said("--data", tmp_path / "nothing.txt")
    assert "Is a directory" in said("--data", tmp_path)
    assert "too little" in said("--data", tmp_path / "short.txt")
    assert "--data, or --self-distill" in said("--data", None)
    assert "is a file" in said("--out", text)
    assert "not a folder that you may write to" in said("--out", text / "below")
    assert "check --self-distill" in said("--self-distill", tmp_path / "nothing.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_drafter_is_no_target(target: Path, text: Path, tmp_path: Path) -> None:
    heads = tmp_path / "heads"
    assert main(["medusa", "--target", str(target), "--data", str(text), "--out", str(heads), *RUN]) == 0
    shutil.copy(target / "tokenizer.json", heads)
    message = refused("mtp", "--target", heads, "--data", text, "--out", tmp_path / "out", *RUN)
    assert f"--speculate medusa={heads}" in message


def test_a_failed_distillation_does_not_bind_the_next(target: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f(x):"}\n' * 4)
    words = ["medusa", "--target", target, "--self-distill", prompts, "--out", tmp_path / "out", *RUN]
    assert "lower --distill-tokens" in refused(*words, "--distill-tokens", 1000)
    assert main([str(word) for word in [*words, "--distill-tokens", 40]]) == 0
    assert "other prompts or settings" in refused(*words, "--distill-tokens", 41)


def test_a_tokenizer_of_another_run_is_not_taken(text: Path, tmp_path: Path) -> None:
    from decoding.text import Tokenizer

    words = ["lm", "--out", str(tmp_path / "out"), *LM, *RUN]
    (tmp_path / "empty.txt").write_text("")
    refused(*words, "--data", tmp_path / "empty.txt")
    assert main([*words, "--data", str(text)]) == 0
    assert Tokenizer.load(tmp_path / "out").vocab_size == 280


class Stubborn:
    """A recipe whose end fails: ctrl-C in the last validation, then a full disk, then neither."""

    def __init__(self) -> None:
        self.module = torch.nn.Linear(1, 1)
        self.failures = ["validation", "disk"]

    def loss(self, windows: Windows) -> Losses:
        if not self.module.training and self.failures[:1] == ["validation"]:
            self.failures.pop(0)
            raise KeyboardInterrupt
        return Losses(self.module(windows.tokens[..., None].float()).square().mean(), {})

    def save(self, folder: Path) -> None:
        if self.failures[:1] == ["disk"]:
            self.failures.pop(0)
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "result").write_text("done")


def test_what_fails_at_the_end_can_be_ended_later(tmp_path: Path) -> None:
    corpus = Corpus(np.arange(400, dtype=np.int32) % 7, np.ones(400, dtype=bool))
    recipe = Stubborn()

    def trainer() -> Trainer:
        sampler, run = WindowSampler(corpus, 16, 2, seed=0), RunOptions(steps=3, batch=2)
        made = Trainer(recipe, sampler, run, OptimizerOptions(), tmp_path, torch.device("cpu"), None)
        made.resume({})
        return made

    with pytest.raises(KeyboardInterrupt):
        trainer().run()
    assert trainer().position.step == 3
    with pytest.raises(TrainError, match="unharmed"):
        trainer().run()
    last = trainer()
    assert last.position.step == 3
    last.run()
    assert recipe.failures == []
    assert (tmp_path / "result").read_text() == "done"
    assert load_state(tmp_path / ".train") is None


def test_a_result_without_room_can_be_written_later(target: Path, text: Path, tmp_path: Path) -> None:
    from tests.unit.test_training import limited_files

    out = tmp_path / "out"
    words = ["medusa", "--target", str(target), "--data", str(text), "--out", str(out), *RUN]
    with limited_files(20_000):
        assert "unharmed" in refused(*words)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []
    assert not list(out.rglob("*.safetensors"))
    assert main(words) == 0
