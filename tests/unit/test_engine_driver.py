"""Messages that come in the middle of a step: requests are let in, all else keeps its turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from decoding.errors import RequestError
from decoding.messages import (
    Cancel,
    EngineInfo,
    EngineStats,
    FromEngine,
    Rejected,
    Shutdown,
    StepOutput,
    Submit,
    ToEngine,
    TokenEvent,
)
from decoding.request import GenerateRequest, SamplingParams
from server.engine_driver import EngineDriver


class Noting:
    """Implements SteppedEngine: it notes what is asked of it, and when it is in the middle of a step."""

    info = EngineInfo("noting", 100, 100, (0,), (), "none", "cpu")

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.has_work = True

    def submit(self, request: GenerateRequest) -> None:
        if request.request_id == "bad":
            raise RequestError("no", param="prompt")
        self.notes.append(f"submit {request.request_id}")

    def cancel(self, request_id: str, choice: int | None = None) -> list[TokenEvent]:
        self.notes.append(f"cancel {request_id}")
        return [TokenEvent(request_id, 0, finish_reason="cancelled")]

    def step(self, arrivals: Callable[[], None] | None = None) -> list[TokenEvent]:
        self.notes.append("begin")
        assert arrivals is not None
        arrivals()
        self.notes.append("end")
        return []

    def stats(self) -> EngineStats:
        return EngineStats()

    def close(self) -> None:
        self.notes.append("close")


def submit(name: str) -> Submit:
    return Submit(GenerateRequest(name, (1,), SamplingParams(1)))


def driver_of(inbox: deque[ToEngine], sent: list[FromEngine]) -> tuple[EngineDriver, Noting]:
    engine = Noting()
    return EngineDriver(engine, sent.append, lambda: inbox.popleft() if inbox else None), engine


def test_requests_that_come_in_mid_step_are_let_in_and_refused_there() -> None:
    inbox: deque[ToEngine] = deque([submit("a")])
    sent: list[FromEngine] = []
    driver, engine = driver_of(inbox, sent)
    assert driver.drain()
    inbox.extend([submit("b"), submit("bad")])
    driver.step()
    assert engine.notes == ["submit a", "begin", "submit b", "end"]
    assert [message.request_id for message in sent if isinstance(message, Rejected)] == ["bad"]


def test_all_else_waits_for_the_end_of_the_step_in_its_order() -> None:
    inbox: deque[ToEngine] = deque([Cancel("a"), submit("a"), Cancel("a"), Shutdown()])
    sent: list[FromEngine] = []
    driver, engine = driver_of(inbox, sent)
    driver.step()
    assert engine.notes == ["begin", "end"], "a request of the name may be in flight until the cancellation"
    inbox.append(submit("late"))
    assert not driver.drain()
    assert engine.notes[2:] == ["cancel a", "submit a", "cancel a"]
    ends = [event for message in sent if isinstance(message, StepOutput) for event in message.events]
    assert [event.finish_reason for event in ends] == ["cancelled", "cancelled"]


def test_what_was_held_comes_before_what_is_still_to_be_received() -> None:
    inbox: deque[ToEngine] = deque([Cancel("a")])
    driver, engine = driver_of(inbox, [])
    driver.step()
    inbox.append(submit("a"))
    assert driver.drain()
    assert engine.notes == ["begin", "end", "cancel a", "submit a"]
