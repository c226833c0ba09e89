"""Clients and engines at their worst. After each fault: every request ended exactly once, nothing is held, the server
serves on.

A few of each here; ``make faults`` (FAULTS=10) does it at full size, on the demo model as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from decoding.config import EngineConfig
from decoding.errors import EngineDeadError
from decoding.request import GenerateRequest, SamplingParams
from server.engine_client import EngineClient
from server.socket_client import SocketEngineClient
from server.supervisor import RestartPolicy, Supervisor
from tests.api.harness import eventually
from tests.process.counting_engine import SLOW
from tests.process.faults import Resources, come_and_go, ends_of, open_to, request_bytes, settled
from tests.process.serving import COMMAND, COUNTING, DEMO, Served, serving

pytestmark = pytest.mark.process

SIZE = int(os.environ.get("FAULTS", "1"))
ENGINES = {"counting": COUNTING, "demo": (*COMMAND, "serve", *DEMO)}
FLAGS = ("--header-timeout", "1", "--body-timeout", "1", "--write-timeout", "1", "--max-queued-requests", "20000")
LONG: dict[str, Any] = {"prompt": [40, 41, 42], "max_tokens": 900, "ignore_eos": True, "stream": True}
MIB = 2**20


@pytest.fixture(scope="module", params=["counting"] if SIZE == 1 else list(ENGINES))
def server(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(*FLAGS, program=ENGINES[request.param]) as served:
        settled(served, Resources(10**6, 0))  # what is made at the first request is there
        yield served
        status, _ = served.end()
        assert status == 0
        mistakes = [line for line in served.log if "Traceback" in line or "Error" in line]
        assert not mistakes, "".join(served.log)[-6000:]


@pytest.fixture
def before(server: Served) -> Resources:
    return Resources.of(server)


def test_clients_that_come_and_go(server: Served, before: Resources) -> None:
    dice = random.Random(7)
    bodies = [LONG, {**LONG, "stream": False}, {**LONG, "n": 4}, {**LONG, "prompt": [[40], [41, 42]]}]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(50 * SIZE):
            pool.submit(come_and_go, server, random.Random(dice.random()), dice.choice(bodies))
    settled(server, before)


def test_heads_and_bodies_that_are_never_sent(server: Served, before: Resources) -> None:
    dice = random.Random(8)
    whole = request_bytes(LONG)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(open_to(server)) for _ in range(40 * SIZE)]
        for each in held:
            each.sendall(whole[: dice.randrange(1, len(whole) - 1)])
        answers = [_until_closed(each) for each in held]
        assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
        settled(server, before)


def _until_closed(opened: Any) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := opened.recv(65536):
            received += data
    return received


def test_clients_that_read_nothing(server: Served, before: Resources) -> None:
    scored = {**LONG, "logprobs": 20, "n": 8}  # much to say
    with contextlib.ExitStack() as stack:
        for _ in range(4 * SIZE):
            stack.enter_context(open_to(server, receive_buffer=2048)).sendall(request_bytes(scored))
        assert ends_of(server, [{**LONG, "max_tokens": 50}] * 4) == {"length": 4}  # others do not feel it
        after = settled(server, before)  # while those connections are still open at their end
    assert after.resident - before.resident < 96 * MIB


def test_bodies_of_50_mb(server: Served, before: Resources) -> None:
    def pieces() -> Iterable[bytes]:
        for _ in range(50):
            yield b" " * MIB

    def post(chunked: bool) -> int:
        headers = {"content-type": "application/json"} | ({} if chunked else {"content-length": str(50 * MIB)})
        with contextlib.suppress(httpx.TransportError):  # what is not sent within the body's time is cut off
            return httpx.post(f"{server.url}/v1/completions", content=pieces(), headers=headers, timeout=60).status_code
        return 0

    with ThreadPoolExecutor(4) as pool:
        found = Counter(pool.map(post, [False, True] * 2 * SIZE))
    assert set(found) <= {413, 408, 0}
    assert found[413] > 0
    assert settled(server, before).resident - before.resident < 64 * MIB


def test_a_queue_of_thousands(server: Served, before: Resources) -> None:
    bodies = [{"prompt": [[40 + i % 20]] * 500, "max_tokens": 1, "ignore_eos": True} for i in range(2 * SIZE)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: _post(server, body), bodies))
    for answer in answers:
        assert answer.status_code == 200, answer.text[:500]
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(500))
        assert {choice["finish_reason"] for choice in choices} == {"length"}
    settled(server, before)


def test_a_queue_of_thousands_that_nobody_waits_for(server: Served, before: Resources) -> None:
    body = {"prompt": [[40 + i % 20] for i in range(500)], "max_tokens": 500, "ignore_eos": True}
    finished = server.metrics()["saccade_requests_finished_total"]
    with contextlib.ExitStack() as stack:
        for _ in range(2 * SIZE):
            stack.enter_context(open_to(server)).sendall(request_bytes(body))
        assert eventually(lambda: server.metrics()["saccade_waiting"] > 100, 20)
    settled(server, before)
    assert server.metrics()["saccade_requests_finished_total"] == finished + 1000 * SIZE + 1  # and settled's own


def _post(server: Served, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)


def test_more_than_there_is_room_for() -> None:
    with serving("--max-num-seqs", "4", "--max-queued-requests", "8", program=COUNTING) as server:
        before = Resources.of(server)
        ends = ends_of(server, [{**LONG, "max_tokens": 50}] * 60)
        assert set(ends) == {"length", "server_overloaded"}
        assert sum(ends.values()) == 60
        assert ends["length"] >= 12
        settled(server, Resources(before.descriptors + 4, before.resident))


def test_an_engine_killed_under_32_streams(server: Served, before: Resources) -> None:
    with ThreadPoolExecutor(1) as pool:
        # one of them takes its time at every step, so that none has ended before all have begun
        ending = pool.submit(ends_of, server, [LONG] * 31 + [{**LONG, "prompt": [SLOW]}])
        assert eventually(lambda: server.metrics()["saccade_running"] >= 32, 30)
        os.kill(server.engine_pid(), signal.SIGKILL)
        ends = ending.result()
    assert ends == {"engine_dead": 32}
    assert eventually(lambda: httpx.get(f"{server.url}/health").status_code == 200, 60)
    settled(server, Resources(before.descriptors + 2, before.resident))


def test_an_engine_killed_again_and_again_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    policy = RestartPolicy(first_delay=0.01, longest_delay=0.01, max_useless_lives=100)
    made: list[SocketEngineClient] = []

    def make() -> EngineClient:
        made.append(SocketEngineClient(EngineConfig("m"), engine="tests.process.counting_engine:CountingEngine"))
        return made[-1]

    async def main() -> None:
        supervisor = Supervisor(make, policy)
        await supervisor.start()
        held = []
        for life in range(2 * SIZE + 1):
            async with asyncio.timeout(60):
                while supervisor.state != "ready":
                    await asyncio.sleep(0.01)
            asked = [GenerateRequest(f"{life}-{i}", (1, 2), SamplingParams(max_tokens=900)) for i in range(8)]
            running = [asyncio.create_task(_count(supervisor, each)) for each in asked]
            await asyncio.sleep(0.05)
            held.append((len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())))
            pid = made[-1].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            for result in await asyncio.gather(*running, return_exceptions=True):
                assert isinstance(result, EngineDeadError)
        assert held[0] == held[-1], "descriptors and tasks of the engines before are gone"
        assert supervisor.in_flight == 0
        await supervisor.close()

    asyncio.run(main())
    assert not [each for each in made if Path(f"/proc/{each.pid}/status").exists()]
    assert not list(tmp_path.iterdir())


async def _count(client: EngineClient, asked: GenerateRequest) -> int:
    return sum([len(event.token_ids) async for event in client.generate(asked)])


def test_requests_that_are_cancelled_in_every_state(server: Served, before: Resources) -> None:
    """Waiting, running, streamed or whole, one choice or many: the engine ends each as soon as its client is gone."""
    finished = server.metrics()["saccade_requests_finished_total"]
    shapes = [{}, {"stream": False}, {"n": 8}, {"n": 8, "stream": False}, {"prompt": [[40]] * 16}]
    choices = 1 + 1 + 8 + 8 + 16
    with contextlib.ExitStack() as stack:
        for _ in range(4):  # more than a batch: some of them wait
            for shape in shapes:
                stack.enter_context(open_to(server)).sendall(request_bytes({**LONG, **shape}))
        assert eventually(lambda: _choices(server) >= 4 * choices - 10, 20)
        time.sleep(0.05)
    settled(server, before)
    assert server.metrics()["saccade_requests_finished_total"] == finished + 4 * choices + 1


def _choices(server: Served) -> float:
    found = server.metrics()
    return found["saccade_running"] + found["saccade_waiting"]


def test_a_client_that_leaves_while_its_prompt_is_tokenized(server: Served, before: Resources) -> None:
    text = {"prompt": ["x = 1\n" * 150] * 500, "max_tokens": 1}
    for pause in (0.0, 0.02, 0.1):
        with open_to(server) as opened:
            opened.sendall(request_bytes(text))
            time.sleep(pause)
    settled(server, before)
