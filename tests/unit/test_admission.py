"""Room for requests and choices, when to come back, and keys."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from decoding.errors import ConfigError, RequestError
from server.admission import Guard, Room, Ticket
from server.auth import ApiKeys, AuthenticationError, collect_keys
from server.body_memory import BodyMemory
from server.errors import LateError, OverloadedError, reply_to, retry_headers
from server.limits import Limits
from server.pace import LEAST_SECONDS, MOST_SECONDS, Pace
from server.security import Security


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scope(path: str = "/v1/completions", method: str = "POST", **headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": pairs,
    }


def test_a_request_comes_in_as_long_as_the_queue_has_a_place() -> None:
    room = Room(rows=2, queue=1)
    first, second, third = Ticket(room), Ticket(room), Ticket(room)
    first.queue(2)
    second.queue(5)  # more than is left, and still: it would never come in otherwise
    assert room.full
    with pytest.raises(OverloadedError):
        third.queue(1)
    second.give_back()
    second.give_back()
    third.queue(1)
    assert room.full
    first.give_back()
    assert not room.full


def test_requests_at_once_are_counted_until_they_end() -> None:
    guard = Guard(Limits(max_concurrent_requests=2), ApiKeys(), rows=1)
    with guard.admit(scope()), guard.admit(scope()):
        assert guard.full
        with pytest.raises(OverloadedError, match="2 requests"):
            guard.admit(scope())
        with guard.admit(scope("/v1/models", "GET")):  # costs nothing
            pass
    assert not guard.full
    with pytest.raises(ZeroDivisionError), guard.admit(scope()):
        raise ZeroDivisionError
    assert not guard.full


def test_without_a_limit_of_its_own_it_is_a_batch_and_a_queue() -> None:
    guard = Guard(Limits(max_queued_requests=1), ApiKeys(), rows=1)
    with guard.admit(scope()), guard.admit(scope()), pytest.raises(OverloadedError):
        guard.admit(scope())


def test_choices_are_given_back_when_the_request_ends() -> None:
    guard = Guard(Limits(max_queued_requests=0), ApiKeys(), rows=3)
    with guard.admit(scope()) as ticket:
        ticket.queue(3)
        assert guard.room.full
    assert not guard.room.full


def test_a_body_counts_until_its_prompts_are_token_ids() -> None:
    memory, room = BodyMemory(100), Room(1, 0)
    tickets = [Ticket(room) for _ in range(2)]
    for ticket in tickets:
        held = memory.begin()
        ticket.hold(held)
        held.take(40)
    with pytest.raises(OverloadedError, match="large requests"):
        memory.begin().take(21)
    tickets[0].queue(1)
    assert memory.held == 40
    with pytest.raises(OverloadedError, match="queue is full"):
        tickets[1].queue(1)
    for ticket in tickets:
        ticket.give_back()
    assert memory.held == 0


def test_when_to_come_back_follows_the_pace() -> None:
    clock = Clock()
    room = Room(rows=1, queue=100, clock=clock)
    tickets = [Ticket(room) for _ in range(101)]
    for ticket in tickets:
        ticket.queue(1)
    assert room.retry_after() == LEAST_SECONDS  # nothing has ended yet
    for ticket in tickets[:41]:
        clock.now += 0.5
        ticket.give_back()
    assert room.retry_after() == pytest.approx(59 / 2 * 0.5)


def test_the_pace_is_that_of_busy_times() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.ended(1, busy=False)
    clock.now = 1000.0  # nothing was asked for
    pace.ended(1, busy=True)
    clock.now = 1002.0
    pace.ended(4, busy=True)
    assert pace.seconds_for(10) == pytest.approx(5.0)
    assert pace.seconds_for(0) == LEAST_SECONDS
    assert pace.seconds_for(10**6) == MOST_SECONDS


def test_headers_tell_when_in_both_forms() -> None:
    spread = {int(retry_headers(2.0)["retry-after-ms"]) for _ in range(50)}
    assert retry_headers(2.1)["Retry-After"] == "3"
    assert retry_headers(0.1)["Retry-After"] == "1"
    assert 1500 <= min(spread) < max(spread) <= 2500


def test_an_overloaded_server_says_so_as_openai_does() -> None:
    reply = reply_to(OverloadedError("Full.", retry_after=4.2))
    assert (reply.status, reply.type, reply.code) == (429, "rate_limit_error", "server_overloaded")
    assert reply.headers["Retry-After"] == "5"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1e999"])
def test_a_deadline_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(RequestError) as refused:
        Guard(Limits(), ApiKeys(), 1).admit(scope(x_request_timeout=value))
    assert refused.value.param == "x-request-timeout"


@pytest.mark.parametrize(
    ("server", "asked", "least", "most"), [(None, "5", 4, 5), (3.0, "5", 2, 3), (9.0, "5", 4, 5), (3.0, None, 2, 3)]
)
def test_the_earlier_deadline_counts(server: float | None, asked: str | None, least: float, most: float) -> None:
    headers = {} if asked is None else {"x_request_timeout": asked}
    with Guard(Limits(request_timeout=server), ApiKeys(), 1).admit(scope(**headers)) as ticket:
        remaining = ticket.remaining()
    assert remaining is not None
    assert least < remaining <= most


def test_without_a_deadline_there_is_time() -> None:
    with Guard(Limits(), ApiKeys(), 1).admit(scope()) as ticket:
        assert ticket.remaining() is None


def test_a_deadline_that_has_passed_takes_no_place() -> None:
    room = Room(1, 0)
    with pytest.raises(LateError) as late:
        Ticket(room, deadline=-1.0).queue(1)
    assert late.value.code == "deadline_exceeded"
    assert not room.full


@pytest.mark.parametrize("headers", [{"a": "x" * 70_000}, {f"h{i}": "x" for i in range(300)}])
def test_headers_that_came_in_one_piece_are_limited_too(headers: dict[str, str]) -> None:
    with pytest.raises(RequestError) as refused:
        Guard(Limits(), ApiKeys(), 1).admit(scope(**headers))
    assert refused.value.code == "headers_too_large"


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return a == b

    monkeypatch.setattr("server.auth.hmac.compare_digest", counting)
    keys = ApiKeys(["one", "two", "three"])
    for key in ("one", "three"):
        compared.clear()
        assert keys.check(scope(authorization=f"Bearer {key}"))
        assert compared == [hashlib.sha256(each.encode()).digest() for each in ("one", "two", "three")]


@pytest.mark.parametrize(
    "sent",
    ["Bearer wrong", "Bearer ", "Bearer", "", "key", "Basic key", "Bearer KEY", "Bearer key key", "Bearer key\x00"],
)
def test_other_keys_are_wrong(sent: str) -> None:
    with pytest.raises(AuthenticationError) as refused:
        ApiKeys(["key"]).check(scope(authorization=sent))
    assert str(refused.value).startswith("Incorrect API key provided")
    assert "wrong" not in str(refused.value)


def test_two_keys_in_one_request_are_wrong() -> None:
    asked = scope(authorization="Bearer key")
    asked["headers"] *= 2
    with pytest.raises(AuthenticationError):
        ApiKeys(["key"]).check(asked)


@pytest.mark.parametrize("sent", ["Bearer key", "bearer key", "BEARER  key "])
def test_the_scheme_has_no_case(sent: str) -> None:
    assert ApiKeys(["other", "key"]).check(scope(authorization=sent))


def test_keys_have_names_that_are_not_they() -> None:
    keys = ApiKeys(["one", "two"])
    names = [keys.check(scope(authorization=f"Bearer {key}")) for key in ("one", "two", "one")]
    assert names[0] == names[2] != names[1]
    assert "one" not in names[0]
    assert hashlib.sha256(b"one").hexdigest()[:8] not in names[0]
    assert ApiKeys().check(scope()) == ""


def test_what_is_open_and_what_is_not() -> None:
    keys, public = ApiKeys(["k"]), ApiKeys(["k"], metrics_public=True)
    for path in ("/health", "/ready", "/live"):
        keys.check(scope(path, "GET"))
    public.check(scope("/metrics", "GET"))
    for path in (
        "/metrics",
        "/v1/models",
        "/healthz",
        "/health/",
        "//health",
        "/v1/../health",
        "/nothing",
        "",
        "/HEALTH",
    ):
        with pytest.raises(AuthenticationError):
            keys.check(scope(path, "GET"))


def test_keys_come_from_three_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n\n  spaced  \n")
    assert collect_keys(["given"], str(file), "e1, e2") == ("given", "from-file", "spaced", "e1", "e2")
    assert collect_keys([], None, None) == ()
    assert collect_keys([], None, "") == ()


@pytest.mark.parametrize("content", ["", "# none\n", "\n\n"])
def test_a_file_without_keys_does_not_open_the_server(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match="has no keys"):
        collect_keys([], str(file), None)


def test_keys_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        collect_keys([], str(tmp_path / "nowhere"), None)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        collect_keys([], str(tmp_path / "binary"), None)
    with pytest.raises(ConfigError) as refused:
        collect_keys(["fine", "s€cret"], None, None)
    assert "API key 2" in str(refused.value)
    assert "cret" not in str(refused.value)


def test_settings_do_not_print_keys() -> None:
    assert "hunter2" not in repr(Security(api_keys=("hunter2",)))
