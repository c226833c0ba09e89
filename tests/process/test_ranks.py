"""Ranks as processes: who listens where, and that the end of one is the end of all, in every order of deaths."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from decoding.assemble import build_stepper, load_target
from decoding.config import EngineConfig
from decoding.engine import Engine
from decoding.errors import ConfigError, EngineDeadError
from decoding.ranks import devices_of
from decoding.request import SamplingParams
from models.parallel.ranks import RankError
from tests.api.harness import eventually
from tests.process.faults import Held, ends_of, settled
from tests.process.serving import COMMAND, ROOT, Served, children, command_line, serving

pytestmark = pytest.mark.process

TARGET = str(ROOT / "demo/target")
SETTINGS: dict[str, Any] = {"dtype": "float64", "num_pages": 100, "plan": "fixed"}
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=1, ignore_eos=True)
PROMPT = "def fib(n):\n"


def ranks_of(pid: int) -> list[int]:
    """Processes of the other ranks of the engine in process ``pid``."""
    return [child for child in children(pid) if "decoding.rank_process" in command_line(child)]


def gone(pid: int) -> bool:
    """The process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@cache
def expected() -> str:
    return Engine.load(TARGET, **SETTINGS).generate(PROMPT, PARAMS)[0].text


@contextlib.contextmanager
def two_ranks() -> Iterator[tuple[Engine, int]]:
    """An engine, and the process of its other rank."""
    engine = Engine.load(TARGET, tensor_parallel_size=2, **SETTINGS)
    (rank,) = ranks_of(os.getpid())
    try:
        yield engine, rank
    finally:
        engine.close()
        assert gone(rank)


def trouble(engine: Engine) -> str:
    """What keeps an engine from going on."""
    try:
        engine.check_health()
    except EngineDeadError as error:
        return str(error)
    return ""


def listening(pid: int) -> list[str]:
    """Addresses that a process listens on, as the kernel writes them."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    entries = [line.split() for table in tables for line in table]
    return [entry[1] for entry in entries if entry[3] == "0A" and entry[9] in inodes]


def test_an_engine_with_a_rank_that_dies() -> None:
    before = listening(os.getpid())  # of other tests
    with two_ranks() as (engine, rank):
        assert engine.generate(PROMPT, PARAMS)[0].text == expected()
        for pid in (os.getpid(), rank):
            found = set(listening(pid)) - set(before)
            assert found, "gloo listens for its own connections"
            assert all(address.startswith("0100007F:") for address in found), "on the loopback interface alone"
        engine.check_health()
        stream = engine.stream(PROMPT, SamplingParams(max_tokens=500, ignore_eos=True, seed=2))
        next(stream)
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="another rank of the model ended"):
            list(stream)
        assert eventually(lambda: "rank 1 ended with status -9" in trouble(engine))


def test_a_rank_ends_with_rank_0() -> None:
    code = f"from decoding.engine import Engine; e = Engine.load({TARGET!r}, tensor_parallel_size=2, num_pages=100)"
    command = [sys.executable, "-c", f"{code}; print('loaded', flush=True); import time; time.sleep(600)"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
        (rank,) = ranks_of(process.pid)
        process.kill()
    assert eventually(lambda: gone(rank))


def test_ctrl_c_in_the_midst_of_a_step_leaves_nothing() -> None:
    """The other rank is in a pass that rank 0 gave up, and hears of nothing else."""
    flags = ("--prompt", PROMPT, "--seed", "9", "--max-tokens", "900", "-tp", "2", "--num-pages", "100")
    command = [*COMMAND, "generate", TARGET, *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        (rank,) = ranks_of(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: both get it
        process.communicate(timeout=60)
        assert process.returncode == 130
    assert gone(rank)


def test_a_rank_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"size 2: a rank did not start: it ended with status 1; its log is above"):
        Engine.load(TARGET, tensor_parallel_size=2, **SETTINGS)


def test_a_rank_that_dies_before_the_engine_is_put_together() -> None:
    config = EngineConfig(TARGET, tensor_parallel_size=2, **SETTINGS)
    loaded = [load_target(config)]
    (rank,) = ranks_of(os.getpid())
    os.kill(rank, signal.SIGKILL)

    def cannot_be_built() -> bool:
        try:
            build_stepper(config, loaded[0], [])
        except RankError:
            return True
        return False

    assert eventually(cannot_be_built)
    loaded.clear()  # nobody closed it
    gc.collect()
    assert gone(rank)
    assert not ranks_of(os.getpid())


def test_nothing_is_left_of_an_engine_that_could_not_be_put_together() -> None:
    with pytest.raises(ConfigError, match="--max-nodes must be in"):
        Engine.load(TARGET, tensor_parallel_size=2, max_nodes=64, **SETTINGS)
    assert not ranks_of(os.getpid())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 3}, r"--tensor-parallel-size 3 does not fit .*sizes that do: 1, 2, 4"),
        ({"draft_tensor_parallel_size": 2}, "do not go together"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size 0 does not fit"),
    ],
)
def test_sizes_that_cannot_be_start_nothing(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine.load(TARGET, **settings)


def test_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [str(device) for device in devices_of(torch.device("cuda"), 2)] == ["cuda:0", "cuda:1"]
    assert [device.index for device in devices_of(torch.device("cuda", 1), 3)] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"size 4 from cuda:2 on needs a GPU for each rank.*4 in all; lower it to 2"):
        devices_of(torch.device("cuda", 2), 4)


# a server ------------------------------------------------------------------------------------------------------------

FLAGS = ("--tensor-parallel-size", "2", "--dtype", "float64", "--num-pages", "400", "--plan", "fixed")
DRAFTERS = ("--speculate", f"draft={ROOT}/demo/draft", "--speculate", "ngram")
LONG = {"prompt": [40, 41, 42], "max_tokens": 800, "ignore_eos": True, "stream": True}


def healthy(server: Served, restarts: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        found = httpx.get(f"{server.url}/health").status_code == 200
        return found and server.metrics()["saccade_engine_restarts_total"] == restarts
    return False


def test_a_server_whose_ranks_die_one_after_another() -> None:
    with serving(TARGET, *FLAGS, *DRAFTERS) as server:
        body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0.8, "seed": 1, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["text"] == expected()
        before = Held.of(server)
        seen: list[int] = []

        def the_rank() -> int:
            (rank,) = ranks_of(server.engine_pid())
            assert rank not in seen
            seen.append(rank)
            return rank

        rank = the_rank()
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(ends_of, server, [LONG] * 12)
            assert eventually(lambda: server.metrics()["saccade_running"] >= 12, 30)
            os.kill(rank, signal.SIGKILL)
            assert ending.result() == {"engine_dead": 12}
        assert eventually(lambda: healthy(server, 1), 60)
        settled(server, before, descriptors=2)

        os.kill(the_rank(), signal.SIGKILL)  # while nothing is to be done: it is noticed all the same
        assert eventually(lambda: healthy(server, 2), 60)

        rank = the_rank()
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert eventually(lambda: gone(rank))
        assert eventually(lambda: healthy(server, 3), 60)

        rank = the_rank()
        status, _ = server.end()
        assert status == 0
        assert all(gone(pid) for pid in seen)
    assert "Traceback" not in "".join(server.log)
    assert any("2 ranks, cpu" in line for line in server.log)
    assert any("the engine ends: " in line for line in server.log)
