"""The command line: what it accepts, what it refuses, and how."""

from __future__ import annotations

import argparse
import dataclasses
from importlib.metadata import version

import pytest

from decoding.acceptance import Acceptance
from decoding.config import EngineConfig
from decoding.errors import ConfigError
from server.cli import parse
from server.flags import engine_config, size
from server.limits import Limits
from server.reading_flags import reading
from server.security import Security
from server.serve_flags import limits, security, tls


def test_no_flags_are_the_defaults_of_the_config() -> None:
    args = parse(["serve", "demo/target"])
    assert engine_config(args) == EngineConfig("demo/target")
    assert limits(args) == Limits()
    assert security(args, None) == Security()
    assert tls(args) is None
    assert (args.host, args.port) == ("127.0.0.1", 8000)


def test_every_flag_arrives() -> None:
    flags = (
        "serve m --speculate ngram --speculate draft=d --tokenizer t --dtype float32 --device cpu --seed 3 "
        "--max-model-len 100 --max-num-seqs 4 --max-num-batched-tokens 64 --max-nodes 5 --max-depth 0 "
        "--plan fixed:nodes=5 --acceptance typical:epsilon=0.2 "
        "--kv-cache-memory 512M --gpu-memory-utilization 0.5 --num-pages 9 --no-prefix-caching --attention reference "
        "--enforce-eager --threads 2 -tp 2 --draft-tensor-parallel-size 2 "
        "--generation-config vllm --served-model-name a b --host 0.0.0.0 --port 0"
    )
    args = parse(flags.split())
    assert engine_config(args) == EngineConfig(
        model="m",
        tokenizer="t",
        speculate=("ngram", "draft=d"),
        dtype="float32",
        device="cpu",
        max_model_len=100,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_nodes=5,
        max_depth=0,
        plan="fixed:nodes=5",
        acceptance="typical:epsilon=0.2",
        kv_cache_memory=512 * 2**20,
        gpu_memory_utilization=0.5,
        num_pages=9,
        prefix_caching=False,
        seed=3,
        generation_config="vllm",
        attention="reference",
        enforce_eager=True,
        threads=2,
        tensor_parallel_size=2,
        draft_tensor_parallel_size=2,
    )
    assert args.served_model_name == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2**31), ("512M", 2**29), ("512mb", 2**29), ("1000", 1000), ("1.5k", 1536), ("1TiB", 2**40)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "two"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("serv demo", "did you mean 'serve'"),
        ("serve demo --max_model_len 5", "did you mean '--max-model-len'"),
        ("serve demo --speculat ngram", "did you mean '--speculate'"),
        ("serve demo --max-model 5", "did you mean '--max-model-len'"),
        ("generate demo --prompt x --port 5", "unknown argument --port"),
        ("serve demo extra", "unexpected argument 'extra'"),
        ("serve demo --max-nodes -1", "'-1' is not a whole number of at least 0"),
        ("serve demo --seed 18446744073709551616", "64 bits"),
        ("serve demo --seed x", "64 bits"),
        ("serve demo --gpu-memory-utilization nan", "from 0 to 1"),
        ("serve demo --gpu-memory-utilization 1.5", "from 0 to 1"),
        ("serve demo --gpu-memory-utilization -0.1", "from 0 to 1"),
        ("serve demo --port 70000", "no port"),
        ("serve demo --max-num-seqs 0", "at least 1"),
        ("serve demo --kv-cache-memory lots", "2GiB"),
        ("serve demo --dtype int8", "invalid choice"),
        ("serve", "MODEL"),
        ("generate demo", "--prompt"),
        ("", "COMMAND"),
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


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("exact", Acceptance()),
        ("typical", Acceptance("typical")),
        ("typical:delta=0.4,bonus=argmax,epsilon=1", Acceptance("typical", 1.0, 0.4, "argmax")),
    ],
)
def test_acceptance_rules(rule: str, expected: Acceptance) -> None:
    assert Acceptance.parse(rule) == expected


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        ("typcial", "did you mean 'typical'? (there are: exact, typical)"),
        ("", "there are: exact, typical"),
        ("typical:epsilom=1", "did you mean 'epsilon'"),
        ("typical:epsilon", "epsilon must be a number, not ''"),
        ("typical:epsilon=x", "epsilon must be a number, not 'x'"),
        ("typical:epsilon=nan", "epsilon must be in (0, 1], not nan"),
        ("typical:delta=0", "delta must be in (0, 1], not 0"),
        ("typical:bonus=greedy", "there are: keyed, argmax"),
        ("exact:delta=0.5", "delta is an option of the rule 'typical'"),
    ],
)
def test_wrong_acceptance_rules_are_known_before_a_model_is_loaded(rule: str, part: str) -> None:
    with pytest.raises(ConfigError) as raised:
        engine_config(parse(["serve", "demo", "--acceptance", rule]))
    assert str(raised.value).startswith(f"--acceptance {rule}: ")
    assert part in str(raised.value)


def test_every_limit_has_a_flag() -> None:
    given = {field.name: 2 for field in dataclasses.fields(Limits)}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert limits(parse(["serve", "m", *words])) == Limits(**given)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("--max-n 129", "more than 128"),
        ("--max-logprobs 21", "more than 20"),
        ("--max-queued-requests -1", "at least 0"),
        ("--max-connections 0", "at least 1"),
        ("--request-timeout 0", "seconds above 0"),
        ("--request-timeout nan", "no number of seconds"),
        ("--shutdown-timeout -1", "no number of seconds"),
        ("--max-body-size lots", "2GiB"),
        ("--max-queued-request 5", "did you mean '--max-queued-requests'"),
        ("--api-keys x", "did you mean '--api-key'"),
    ],
)
def test_limits_that_cannot_be(line: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["serve", "demo", *line.split()])
    assert ended.value.code == 2
    assert part in capsys.readouterr().err


def test_who_may_use_the_server() -> None:
    switches = ("--isolate-keys", "--metrics-public", "--log-prompts")
    args = parse(["serve", "m", "--api-key", "a", "b", "--cors-origins", "https://chat.example", *switches])
    assert security(args, "c,d") == Security(("a", "b", "c", "d"), True, ("https://chat.example",), True, True)


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/path", "ftp://x", "https://", "null"])
def test_origins_that_are_none(origin: str) -> None:
    with pytest.raises(ConfigError, match="an origin is a scheme and a host"):
        security(parse(["serve", "m", "--cors-origins", origin]), None)


def test_help_tells_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["serve", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "of a request's body (default: 8MiB)" in said
    assert "of a request's line and headers (default: 64KiB)" in said
    assert "in which its body must arrive (default: 60)" in said


def test_an_empty_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["serve", "demo", "--served-model-name", "a", ""])
    assert "cannot be empty" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"saccade {version('saccade')}\n"


def test_help_names_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["serve", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    config = EngineConfig("demo")
    assert f"choices in one batch (default: {config.max_num_seqs})" in said
    assert f"depth of a tree (default: {config.max_depth})" in said


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    assert "saccade serve demo/target" in capsys.readouterr().out


def test_formats_of_tools_and_reasoning() -> None:
    assert reading(parse(["serve", "m"])) == {}
    flags = "serve m --tool-call-parser hermes --reasoning-parser qwen3 --enable-auto-tool-choice"
    asked = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3", "enable_auto_tool_choice": True}
    assert reading(parse(flags.split())) == asked


@pytest.mark.parametrize(
    ("flags", "instead"), [("--tool-call-parser mistrall", "mistral"), ("--reasoning-parser qwen", "qwen3")]
)
def test_unknown_formats_are_answered_with_the_nearest(
    flags: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["serve", "m", *flags.split()])
    assert f"did you mean {instead!r}?" in capsys.readouterr().err
