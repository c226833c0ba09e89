"""What a stream keeps for a client that does not read."""

from __future__ import annotations

import asyncio

import pytest

from decoding.messages import StepOutput, Submit, ToEngine, TokenEvent, TokenLogprobs
from decoding.request import GenerateRequest, SamplingParams
from server.engine_client import RoutedEngineClient
from server.errors import SlowReaderError, reply_to
from server.event_router import EventRouter


def ask(name: str, n: int = 1) -> GenerateRequest:
    return GenerateRequest(name, (1,), SamplingParams(n=n, max_tokens=1000))


def test_a_stream_over_its_limit_fails_once_and_holds_nothing() -> None:
    async def main() -> None:
        router = EventRouter(max_pending=10)
        slow, quick = router.open(ask("slow")), router.open(ask("quick"))
        event = TokenEvent("slow", 0, (5,) * 4)
        assert router.dispatch([event, event]) == []
        assert router.dispatch([event, event, TokenEvent("quick", 0, (1,))]) == ["slow"]
        assert router.dispatch([event] * 5) == []  # said once
        assert slow.ended
        assert not slow.drained
        with pytest.raises(SlowReaderError):
            await slow.take()
        assert await quick.take() == [TokenEvent("quick", 0, (1,))]

    asyncio.run(main())


def test_what_was_taken_no_longer_counts() -> None:
    async def main() -> None:
        router = EventRouter(max_pending=10)
        stream = router.open(ask("r"))
        for _ in range(20):
            assert router.dispatch([TokenEvent("r", 0, (5,) * 9)]) == []
            assert len((await stream.take())[0].token_ids) == 9

    asyncio.run(main())


def test_alternatives_with_logprobs_count() -> None:
    router = EventRouter(max_pending=10)
    router.open(ask("r"))
    scored = TokenLogprobs(5, -1.0, ((5, -1.0), (6, -2.0), (7, -3.0), (8, -4.0)))
    assert router.dispatch([TokenEvent("r", 0, (5, 5), logprobs=(scored, scored))]) == []
    assert router.dispatch([TokenEvent("r", 0, (5,), logprobs=(scored,))]) == ["r"]


def test_all_choices_of_a_request_share_the_limit() -> None:
    router = EventRouter(max_pending=10)
    router.open(ask("r", n=3))
    assert router.dispatch([TokenEvent("r", choice, (5,) * 4) for choice in range(3)]) == ["r"]


class Recording(RoutedEngineClient):
    """Keeps what it is told to send."""

    def __init__(self) -> None:
        super().__init__(max_pending=10)
        self.sent: list[ToEngine] = []
        self._state = "ready"

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def _send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def arrive(self, *events: TokenEvent) -> None:
        self._receive(StepOutput(events))


def test_the_engine_is_told_to_end_it_while_its_reader_still_sleeps() -> None:
    async def main() -> None:
        client = Recording()
        events = client.generate(ask("r"))
        reading = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        client.arrive(TokenEvent("r", 0, (1,)))
        assert (await reading).token_ids == (1,)
        for _ in range(4):  # nobody takes these
            client.arrive(TokenEvent("r", 0, (1,) * 4))
        assert [type(message).__name__ for message in client.sent] == ["Submit", "Cancel"]
        assert isinstance(client.sent[0], Submit)
        with pytest.raises(SlowReaderError) as slow:
            await anext(events)
        assert reply_to(slow.value).code == "slow_reader"
        assert len(client.sent) == 2

    asyncio.run(main())
