"""Clients and engines at their worst. After each fault: every request ended exactly once, nothing is held, the server
serves on (``settled``).

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

from benchmarks.raw_client import ask
from decoding.config import EngineConfig
from decoding.errors import EngineDeadError
from decoding.request import GenerateRequest, SamplingParams
from server.engine_client import EngineClient
from server.socket_client import SocketEngineClient
from server.supervisor import RestartPolicy, Supervisor
from tests.api.harness import eventually
from tests.process.counting_engine import SLOW
from tests.process.faults import MIB, Held, come_and_go, ends_of, open_to, request_bytes, settled
from tests.process.serving import COMMAND, COUNTING, DEMO, Served, serving

pytestmark = pytest.mark.process

SIZE = int(os.environ.get("FAULTS", "1"))
ENGINES = {"counting": COUNTING, "demo": (*COMMAND, "serve", *DEMO)}
CROWD = 300 if SIZE == 1 else 1000 * SIZE  # connections at once
ROWS = 32
TIMEOUT = "1" if SIZE == 1 else "5"  # a client of thousands of connections takes its time between two of them
FLAGS = (
    *("--max-num-seqs", str(ROWS)),
    *("--header-timeout", TIMEOUT, "--body-timeout", TIMEOUT, "--write-timeout", "1"),
    *("--max-queued-requests", "20000", "--max-connections", str(CROWD + 100)),
)
LONG: dict[str, Any] = {"prompt": [40, 41, 42], "max_tokens": 900, "ignore_eos": True, "stream": True}
# one of the counting engine's choices that takes its time holds up all that run beside it
HOLDING = {**LONG, "prompt": [SLOW]}


@pytest.fixture(scope="module", params=["counting"] if SIZE == 1 else list(ENGINES))
def server(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(*FLAGS, program=ENGINES[request.param]) as served:
        # what is made when it is first needed, and then kept, is there before anybody looks at the memory
        ends_of(served, [{**LONG, "n": 4, "logprobs": 20, "max_tokens": 200}] * 32)
        crowd(served, CROWD)
        settled(served)
        yield served
        status, _ = served.end()
        assert status == 0
        mistakes = [line for line in served.log if "Traceback" in line or "Error" in line or "Task " in line]
        assert not mistakes, "".join(served.log)[-6000:]


@pytest.fixture
def before(server: Served) -> Held:
    return Held.of(server)


def port_of(server: Served) -> int:
    return int(server.url.rpartition(":")[2])


def crowd(server: Served, count: int, *, leave: float | None = None, **body: Any) -> Counter[str]:
    """So many requests, each on a connection of its own, all at once; how they ended."""

    async def main() -> Counter[str]:
        gate = asyncio.Semaphore(200)  # of those that connect and send

        async def one(number: int) -> str:
            asked = {"prompt": [40 + number % 20], "max_tokens": 1, "ignore_eos": True, **body}
            async with gate:
                asking = asyncio.create_task(ask(port_of(server), asked, leave=leave, seconds=600))
                await asyncio.sleep(0)
            outcome = await asking
            return str(outcome.status) if outcome.end == "status" else outcome.end

        return Counter(await asyncio.gather(*(one(number) for number in range(count))))

    return asyncio.run(main())


# clients -------------------------------------------------------------------------------------------------------------


def test_clients_that_come_and_go(server: Served, before: Held) -> None:
    dice = random.Random(7)
    bodies = [LONG, {**LONG, "stream": False}, {**LONG, "n": 4}, {**LONG, "prompt": [[40], [41, 42]]}]
    with ThreadPoolExecutor(16) as pool:
        gone = [
            pool.submit(come_and_go, server.url, random.Random(dice.random()), dice.choice(bodies))
            for _ in range(50 * SIZE)
        ]
    assert not [each.exception() for each in gone if each.exception()]
    after = settled(server, before)
    assert after.ended > before.ended + 1  # some came far enough


def test_heads_and_bodies_that_are_never_sent(server: Served, before: Held) -> None:
    dice = random.Random(8)
    whole = request_bytes(LONG)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(open_to(server.url)) for _ in range(40 * SIZE)]
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


def test_clients_that_read_nothing(server: Served, before: Held) -> None:
    scored = {**LONG, "logprobs": 20, "n": 8}  # much to say
    with contextlib.ExitStack() as stack:
        for _ in range(4 * SIZE):
            stack.enter_context(open_to(server.url, receive_buffer=2048)).sendall(request_bytes(scored))
        assert ends_of(server, [{**LONG, "max_tokens": 50}] * 4) == {"length": 4}  # others do not feel it
        settled(server, before, growth=96 * MIB)  # while those connections are still open at their end
    settled(server, before, growth=64 * MIB)


def test_bodies_of_50_mb(server: Served, before: Held) -> None:
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
    settled(server, before, growth=64 * MIB)


# queues --------------------------------------------------------------------------------------------------------------


def test_a_queue_of_thousands_of_connections(server: Served, before: Held) -> None:
    tokens = 1 if _counts(server) else 12  # a real engine is kept busy by its work
    with ThreadPoolExecutor(1) as pool:
        with _held_up(server):
            ending = pool.submit(crowd, server, CROWD, max_tokens=tokens)
            assert eventually(lambda: server.metrics()["saccade_waiting"] >= CROWD / 2, 120)
        assert ending.result() == {"done": CROWD}
    settled(server, before, growth=64 * MIB)


def test_a_queue_of_thousands_of_connections_that_all_leave(server: Served, before: Held) -> None:
    with _held_up(server):
        ends = crowd(server, CROWD, leave=3.0 * SIZE, max_tokens=800)
    assert set(ends) <= {"left", "done"}  # a real engine finishes some of them first
    assert ends["left"] > 0.9 * CROWD
    settled(server, before, growth=64 * MIB)


@contextlib.contextmanager
def _held_up(server: Served) -> Iterator[None]:
    """The counting engine does nothing else meanwhile: a batch of choices that take their time."""
    with contextlib.ExitStack() as stack:
        if _counts(server):
            stack.enter_context(open_to(server.url)).sendall(request_bytes({**HOLDING, "n": ROWS}))
            assert eventually(lambda: server.metrics()["saccade_running"] >= ROWS)
        yield


def _counts(server: Served) -> bool:
    return "counting" in str(server.process.args)


def test_a_queue_of_thousands_of_choices(server: Served, before: Held) -> None:
    bodies = [{"prompt": [[40 + i % 20]] * 500, "max_tokens": 1, "ignore_eos": True} for i in range(2 * SIZE)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: _post(server, body), bodies))
    for answer in answers:
        assert answer.status_code == 200, answer.text[:500]
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(500))
        assert {choice["finish_reason"] for choice in choices} == {"length"}
    settled(server, before)


def test_a_queue_of_thousands_of_choices_that_nobody_waits_for(server: Served, before: Held) -> None:
    body = {"prompt": [[40 + i % 20] for i in range(500)], "max_tokens": 500, "ignore_eos": True}
    with contextlib.ExitStack() as stack:
        for _ in range(2 * SIZE):
            stack.enter_context(open_to(server.url)).sendall(request_bytes(body))
        assert eventually(lambda: server.metrics()["saccade_waiting"] > 100, 20)
    after = settled(server, before)
    assert after.finished == before.finished + 1000 * SIZE + 1  # and settled's own


def _post(server: Served, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)


def test_more_than_there_is_room_for() -> None:
    """With the limits that a server has by itself: each request is answered, or refused, once."""
    with serving("--max-num-seqs", "4", "--max-queued-requests", "8", program=COUNTING) as server:
        before = settled(server)
        ends = ends_of(server, [{**LONG, "max_tokens": 50}] * 60)
        assert set(ends) == {"length", "server_overloaded"}
        assert sum(ends.values()) == 60
        assert ends["length"] >= 12
        settled(server, before, descriptors=4)
    with serving(program=COUNTING) as server:
        before = settled(server)
        ends = crowd(server, 600 * SIZE, stream=True, max_tokens=50)
        assert set(ends) <= {"done", "429"}
        assert sum(ends.values()) == 600 * SIZE
        assert ends["done"] >= min(600 * SIZE, 1088)  # a batch and a queue
        settled(server, before, descriptors=4, growth=64 * MIB)


# engines -------------------------------------------------------------------------------------------------------------


def test_an_engine_killed_under_32_streams(server: Served, before: Held) -> None:
    _kill_under_streams(server, 32)
    settled(server, before, descriptors=2)


def test_an_engine_killed_20_times_under_load_is_back_each_time(server: Served, before: Held) -> None:
    for life in range(2 * SIZE):
        _kill_under_streams(server, 8)
        assert server.metrics()["saccade_engine_restarts_total"] == before.restarts + life + 1
    settled(server, before, descriptors=2)


def _kill_under_streams(server: Served, streams: int) -> None:
    """Each stream ends with one error, and the engine is replaced."""
    with ThreadPoolExecutor(2) as pool:
        # the first one takes its time at every step, so that none has ended before all have begun
        first = pool.submit(ends_of, server, [HOLDING])
        assert eventually(lambda: server.metrics()["saccade_running"] >= 1, 30)
        others = pool.submit(ends_of, server, [LONG] * (streams - 1))
        assert eventually(lambda: server.metrics()["saccade_running"] >= streams, 30)
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert first.result() + others.result() == {"engine_dead": streams}
    assert eventually(lambda: httpx.get(f"{server.url}/health").status_code == 200, 60)


def test_an_engine_killed_again_and_again_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    policy = RestartPolicy(first_delay=0.01, longest_delay=0.01)
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
            assert not len(made[-1]._router)
        assert held[0] == held[-1], "descriptors and tasks of the engines before are gone"
        assert supervisor.in_flight == 0
        await supervisor.close()

    asyncio.run(main())
    assert not [each for each in made if Path(f"/proc/{each.pid}/status").exists()]
    assert not list(tmp_path.iterdir())


async def _count(client: EngineClient, asked: GenerateRequest) -> int:
    return sum([len(event.token_ids) async for event in client.generate(asked)])


# leaving -------------------------------------------------------------------------------------------------------------


def test_requests_that_are_cancelled_in_every_state(server: Served, before: Held) -> None:
    """Waiting, running, streamed or whole, one choice or many: the engine ends each as soon as its client is gone."""
    shapes = [{}, {"stream": False}, {"n": 8}, {"n": 8, "stream": False}, {"prompt": [[SLOW]] * 16}]
    choices = 1 + 1 + 8 + 8 + 16
    with contextlib.ExitStack() as stack:
        for _ in range(4):  # more than a batch: some of them wait
            for shape in shapes:
                stack.enter_context(open_to(server.url)).sendall(request_bytes({**HOLDING, **shape}))
        assert eventually(lambda: _choices(server) >= 4 * choices - 10, 30)
        time.sleep(0.05)
    after = settled(server, before, growth=64 * MIB)  # an engine may have been started a moment ago
    assert after.finished == before.finished + 4 * choices + 1


def _choices(server: Served) -> float:
    found = server.metrics()
    return found["saccade_running"] + found["saccade_waiting"]


def test_a_client_that_leaves_while_its_prompt_is_tokenized(server: Served, before: Held) -> None:
    text = {"prompt": ["x = 1\n" * 150] * 500, "max_tokens": 1}
    for pause in (0.0, 0.02, 0.1):
        with open_to(server.url) as opened:
            opened.sendall(request_bytes(text))
            time.sleep(pause)
    settled(server, before)
