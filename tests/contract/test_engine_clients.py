"""What every EngineClient promises, over all of its forms."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any

import pytest

from decoding.config import EngineConfig
from decoding.errors import EngineDeadError, RequestError
from decoding.messages import EngineInfo, TokenEvent
from decoding.request import GenerateRequest, SamplingParams
from server.engine_client import EngineClient
from server.errors import UnavailableError
from server.fake_client import Death, FakeEngineClient, Line, Pause
from server.inprocess_client import InProcessEngineClient
from server.socket_client import SocketEngineClient
from server.supervisor import Supervisor
from tests.process.counting_engine import CRASH, FAIL, CountingEngine

CONFIG = EngineConfig("counting")
COUNTING = "tests.process.counting_engine:CountingEngine"


def _script(request: GenerateRequest) -> Iterable[Line]:
    """What CountingEngine does, as a script."""
    engine = CountingEngine(CONFIG)
    engine.submit(request)
    while engine.has_work:
        yield Pause(0.002)
        if CRASH in request.prompt_ids:
            yield Death()
        yield from engine.step()


def _fake() -> EngineClient:
    return FakeEngineClient(EngineInfo("counting", 1000, 100, (0,), (), "float32", "cpu"), _script, state="loading")


CLIENTS: dict[str, Callable[[], EngineClient]] = {
    "fake": _fake,
    "in-process": lambda: InProcessEngineClient(lambda: CountingEngine.load(CONFIG)),
    "socket": lambda: SocketEngineClient(CONFIG, engine=COUNTING),
    "supervised": lambda: Supervisor(_fake),
}

Check = Callable[[EngineClient], Coroutine[Any, Any, None]]


@pytest.fixture(params=CLIENTS)
def check(request: pytest.FixtureRequest) -> Callable[[Check], None]:
    """Runs a check on a started client, and closes the client."""
    make = CLIENTS[request.param]

    async def main(body: Check) -> None:
        client = make()
        await client.start()
        try:
            async with asyncio.timeout(20):
                await body(client)
        finally:
            await client.close()
            await client.close()

    return lambda body: asyncio.run(main(body))


def request(name: str = "r", prompt: tuple[int, ...] = (1, 2, 3), **params: Any) -> GenerateRequest:
    return GenerateRequest(name, prompt, SamplingParams(**params))


async def tokens(client: EngineClient, asked: GenerateRequest) -> dict[int, tuple[list[int], list[str]]]:
    """Per choice: its tokens and its finish reasons."""
    found: dict[int, tuple[list[int], list[str]]] = {choice: ([], []) for choice in range(asked.params.n)}
    async for event in client.generate(asked):
        found[event.choice][0].extend(event.token_ids)
        found[event.choice][1].extend([event.finish_reason] if event.finish_reason else [])
    return found


def test_each_choice_ends_exactly_once(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        assert await tokens(client, request(n=3, max_tokens=5)) == {c: ([1, 2, 3, 1, 2], ["length"]) for c in range(3)}

    check(body)


def test_requests_run_side_by_side(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        asked = [request(f"r{i}", (i + 1,), max_tokens=4) for i in range(8)]
        for i, found in enumerate(await asyncio.gather(*(tokens(client, each) for each in asked))):
            assert found == {0: ([i + 1] * 4, ["length"])}

    check(body)


def test_state_and_info(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        assert client.state == "ready"
        assert (client.info.model, client.info.vocab_size) == ("counting", 100)
        await client.close()
        assert client.state != "ready"
        with pytest.raises((EngineDeadError, UnavailableError)):
            await tokens(client, request())

    check(body)


def test_a_bad_request_is_refused_and_the_next_one_served(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        with pytest.raises(RequestError) as refused:
            await tokens(client, request("bad", (1,), temperature=-1.0))
        assert (refused.value.param, refused.value.code) == ("temperature", "invalid_value")
        assert await tokens(client, request(max_tokens=1)) == {0: ([1], ["length"])}

    check(body)


def test_a_failed_request_ends_with_an_error_event(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        events = [event async for event in client.generate(request("f", (1, FAIL), n=2))]
        last = {event.choice: event for event in events}
        assert [(event.finish_reason, event.error) for event in last.values()] == [("error", "the request failed")] * 2
        assert await tokens(client, request(max_tokens=1)) == {0: ([1], ["length"])}

    check(body)


def test_cancelling_one_choice_leaves_the_others(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        reasons = {}
        async for event in client.generate(request(n=2, max_tokens=60)):
            if event.choice == 0 and not reasons:
                client.cancel("r", 0)
            if event.finish_reason:
                reasons[event.choice] = event.finish_reason
        assert reasons == {0: "cancelled", 1: "length"}

    check(body)


def test_cancelling_unknown_requests_does_nothing(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        client.cancel("nobody")
        client.cancel("nobody", 3)
        assert await tokens(client, request(max_tokens=1)) == {0: ([1], ["length"])}

    check(body)


def test_leaving_early_cancels(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        async with aclosing(client.generate(request(max_tokens=900))) as events:
            async for _ in events:
                break
        while client.stats().running:  # the test's time limit is the judge
            await asyncio.sleep(0.01)
        assert await tokens(client, request(max_tokens=1)) == {0: ([1], ["length"])}

    check(body)


def test_a_slow_consumer_gets_every_token_in_order(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        found: list[TokenEvent] = []
        async for event in client.generate(request(max_tokens=40)):
            found.append(event)
            await asyncio.sleep(0.01)
        assert [token for event in found for token in event.token_ids] == ([1, 2, 3] * 14)[:40]
        assert [event.finish_reason for event in found] == [None] * (len(found) - 1) + ["length"]
        assert found[-1].speculation is not None

    check(body)


def test_death_fails_each_request_once(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        running = [asyncio.create_task(tokens(client, request(f"r{i}", max_tokens=900))) for i in range(3)]
        await asyncio.sleep(0.1)
        crashing = asyncio.create_task(tokens(client, request("crash", (1, CRASH))))
        for result in await asyncio.gather(*running, crashing, return_exceptions=True):
            assert isinstance(result, EngineDeadError)

    check(body)


def test_closing_fails_requests_in_flight(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        running = asyncio.create_task(tokens(client, request(max_tokens=900)))
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises((UnavailableError, EngineDeadError)):
            await running

    check(body)


def test_stats_come_from_the_engine(check: Callable[[Check], None]) -> None:
    async def body(client: EngineClient) -> None:
        assert client.stats().pages_total > 0  # there from the first moment

    check(body)
