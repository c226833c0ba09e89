"""The supervisor: restarts, gives up, drains. On scripted engines, and once on real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from decoding.config import EngineConfig
from decoding.errors import ConfigError, EngineDeadError
from decoding.machine import cores
from decoding.messages import EngineInfo
from decoding.request import GenerateRequest, SamplingParams
from server.engine_client import EngineClient
from server.engine_launch import GOMP_SPINCOUNT, engine_environment
from server.errors import UnavailableError
from server.fake_client import Death, FakeEngineClient, Pause
from server.socket_client import SocketEngineClient
from server.supervisor import RestartPolicy, Supervisor

INFO = EngineInfo("fake", 1000, 100, (0,), (), "float32", "cpu")
QUICK = RestartPolicy(first_delay=0.01, longest_delay=0.05, max_useless_lives=3)
COUNTING = "tests.process.counting_engine:CountingEngine"
ASK = GenerateRequest("r", (1, 2), SamplingParams(max_tokens=3))


class BrokenClient(FakeEngineClient):
    closed = False

    async def start(self) -> None:
        self.die()
        raise ConfigError("the disk is gone")

    async def close(self) -> None:
        self.closed = True
        await super().close()


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def generated(client: EngineClient, asked: GenerateRequest = ASK) -> list[int]:
    return [token async for event in client.generate(asked) for token in event.token_ids]


def fakes(*makers: Callable[[], FakeEngineClient]) -> tuple[list[FakeEngineClient], Callable[[], EngineClient]]:
    """Clients in order, the last kind again and again; and the list of those made."""
    made: list[FakeEngineClient] = []

    def make() -> EngineClient:
        made.append(makers[min(len(made), len(makers) - 1)]())
        return made[-1]

    return made, make


def healthy() -> FakeEngineClient:
    return FakeEngineClient(INFO, state="loading")


def broken() -> FakeEngineClient:
    return BrokenClient(INFO, state="loading")


def test_a_dead_engine_is_replaced() -> None:
    async def main() -> None:
        made, make = fakes(healthy)
        supervisor = Supervisor(make, QUICK)
        with pytest.raises(UnavailableError):
            await generated(supervisor)
        await supervisor.start()
        assert await generated(supervisor) == [1, 2, 1]
        made[0].die()
        assert supervisor.state == "restarting"
        assert supervisor.info is INFO
        with pytest.raises(UnavailableError, match="restarting"):
            await generated(supervisor)
        await until(lambda: supervisor.state == "ready")
        assert (len(made), supervisor.restarts) == (2, 1)
        assert await generated(supervisor) == [1, 2, 1]
        await supervisor.close()

    asyncio.run(main())


def test_failed_starts_are_tried_again() -> None:
    async def main() -> None:
        made, make = fakes(healthy, broken, healthy)
        supervisor = Supervisor(make, QUICK)
        await supervisor.start()
        made[0].die()
        await until(lambda: supervisor.state == "ready" and len(made) == 3)
        await supervisor.close()

    asyncio.run(main())


def test_an_engine_that_cannot_live_is_given_up() -> None:
    async def main() -> None:
        made, make = fakes(healthy, broken)
        supervisor = Supervisor(make, QUICK)
        await supervisor.start()
        made[0].die()
        await asyncio.wait_for(supervisor.wait_dead(), 5)
        assert supervisor.state == "dead"
        assert len(made) == 1 + 1 + QUICK.max_useless_lives  # the sound one comes first
        with pytest.raises(EngineDeadError):
            await generated(supervisor)
        await supervisor.close()

    asyncio.run(main())


def test_engines_that_die_of_their_first_requests_are_given_up_too() -> None:
    async def main() -> None:
        made, make = fakes(lambda: FakeEngineClient(INFO, lambda request: [Death()], state="loading"))
        supervisor = Supervisor(make, QUICK)
        await supervisor.start()
        for life in range(1 + QUICK.max_useless_lives):
            await until(lambda life=life: len(made) == life + 1 and supervisor.state == "ready")  # type: ignore[misc]
            with pytest.raises(EngineDeadError):
                await generated(supervisor)
        await asyncio.wait_for(supervisor.wait_dead(), 5)
        assert supervisor.state == "dead"
        assert len(made) == 1 + QUICK.max_useless_lives

    asyncio.run(main())


@pytest.mark.parametrize("asked", [False, True], ids=["idle", "asked"])
def test_engines_that_are_of_use_are_started_again_and_again(asked: bool) -> None:
    """Each lives for a moment only, as where somebody kills them."""

    async def main() -> None:
        made, make = fakes(healthy)
        supervisor = Supervisor(make, QUICK)
        await supervisor.start()
        for life in range(20):
            await until(lambda life=life: len(made) == life + 1 and supervisor.state == "ready")  # type: ignore[misc]
            if asked:
                assert await generated(supervisor) == [1, 2, 1]
            made[-1].die()
        await until(lambda: supervisor.state == "ready")
        assert supervisor.restarts == 20
        await supervisor.close()

    asyncio.run(main())


def test_a_client_that_could_not_be_started_is_closed() -> None:
    async def main() -> None:
        made, make = fakes(healthy, broken, healthy)
        supervisor = Supervisor(make, QUICK)
        await supervisor.start()
        made[0].die()
        await until(lambda: len(made) == 3 and supervisor.state == "ready")
        assert isinstance(made[1], BrokenClient)
        assert made[1].closed
        await supervisor.close()

    asyncio.run(main())


def test_a_failure_to_load_at_the_start_is_the_callers() -> None:
    async def main() -> None:
        supervisor = Supervisor(fakes(broken)[1], QUICK)
        with pytest.raises(ConfigError, match="the disk is gone"):
            await supervisor.start()
        await supervisor.close()

    asyncio.run(main())


def test_draining_lets_requests_end_and_takes_no_more() -> None:
    async def main() -> None:
        def slow(request: GenerateRequest) -> list[object]:
            from server.fake_client import echo_script

            return [Pause(0.2), *echo_script(request)]

        supervisor = Supervisor(lambda: FakeEngineClient(INFO, slow), QUICK)  # type: ignore[arg-type]
        await supervisor.start()
        running = asyncio.create_task(generated(supervisor))
        await until(lambda: supervisor.in_flight == 1)
        draining = asyncio.create_task(supervisor.drain(5))
        await asyncio.sleep(0)
        assert supervisor.state == "draining"
        with pytest.raises(UnavailableError) as refused:
            await generated(supervisor)
        assert refused.value.code == "draining"
        assert await running == [1, 2, 1]
        await asyncio.wait_for(draining, 1)
        await supervisor.close()

    asyncio.run(main())


def test_delays_grow_to_a_limit() -> None:
    policy = RestartPolicy(first_delay=0.5, longest_delay=4.0)
    assert [policy.delay(lives) for lives in range(1, 6)] == [0.5, 1.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": str(GOMP_SPINCOUNT), "OMP_NUM_THREADS": "3"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5", "OMP_NUM_THREADS": "3"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "3"}),
    ],
)
def test_threads_spin_a_little_unless_the_user_said_otherwise(given: dict[str, str], expected: dict[str, str]) -> None:
    assert engine_environment(EngineConfig("m", threads=3), given) == expected
    assert engine_environment(EngineConfig("m"), {"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"
    assert engine_environment(EngineConfig("m"), {})["OMP_NUM_THREADS"] == str(cores().engine_threads())


@pytest.mark.process
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing", "there is no folder 'missing'"),
        ("broken", "loading 'broken' failed: RuntimeError: a mistake"),
        ("exits", "ended while it loaded"),
    ],
)
def test_an_engine_process_that_cannot_load_says_why(model: str, message: str) -> None:
    async def main() -> None:
        client = SocketEngineClient(EngineConfig(model), engine=COUNTING)
        with pytest.raises(ConfigError, match=message):
            await asyncio.wait_for(client.start(), 20)
        assert client.state == "dead"

    asyncio.run(main())


@pytest.mark.process
def test_a_killed_engine_process_is_replaced_and_its_requests_fail_once() -> None:
    async def main() -> None:
        made: list[SocketEngineClient] = []

        def make() -> EngineClient:
            made.append(SocketEngineClient(EngineConfig("m"), engine=COUNTING))
            return made[-1]

        supervisor = Supervisor(make, QUICK)
        await supervisor.start()
        long = GenerateRequest("long", (1, 2), SamplingParams(max_tokens=900))
        running = asyncio.create_task(generated(supervisor, long))
        await asyncio.sleep(0.1)
        assert made[0].pid is not None
        os.kill(made[0].pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="killed by signal 9"):
            await running
        await until(lambda: supervisor.state == "ready")
        assert await generated(supervisor) == [1, 2, 1]
        pid = made[1].pid
        await supervisor.close()
        assert pid is not None
        assert not Path(f"/proc/{pid}").exists()

    asyncio.run(main())
