"""The HTTP application on a scripted engine and the demo tokenizer, called directly or through a real port."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from starlette.testclient import TestClient

from decoding.messages import EngineInfo, SpeculationStats, TokenEvent, TokenLogprobs
from decoding.request import GenerateRequest
from decoding.text import Tokenizer
from server.app import build_app
from server.engine_client import EngineClient
from server.fake_client import FakeEngineClient, Line, Script, echo_script
from server.listening import Address, listen
from server.serve import http_server
from server.settings import ServerSettings

DEMO = Path(__file__).parents[2] / "demo" / "target"
EOS = 0
INFO = EngineInfo(
    model="demo",
    max_model_len=1024,
    vocab_size=8192,
    eos_token_ids=(EOS,),
    drafters=("draft", "ngram"),
    dtype="float32",
    device="cpu",
)
SETTINGS = ServerSettings(model_names=("demo", "alias"))
STATS = SpeculationStats(steps=2, drafted=5, accepted=3)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text))


def scored(token: int, logprob: float = -0.5, top: Sequence[tuple[int, float]] = ()) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, tuple(top))


def saying(*steps: str | Sequence[int], reason: str = "length", stats: SpeculationStats | None = STATS) -> Script:
    """A script: each choice says each step's text (or ids) in one event; a reason "stop" ends it with the EOS token."""

    def script(request: GenerateRequest) -> Iterable[Line]:
        turns = [ids(step) if isinstance(step, str) else tuple(step) for step in steps]
        if reason == "stop":
            turns[-1] += (EOS,)
        for place, turn in enumerate(turns):
            for choice in range(request.params.n):
                last = place == len(turns) - 1
                yield TokenEvent(
                    request.request_id,
                    choice,
                    turn,
                    logprobs=_logprobs(request, turn),
                    finish_reason=reason if last else None,  # type: ignore[arg-type]
                    stop_token=EOS if last and reason == "stop" else None,
                    seed=request.params.seed if place == 0 else None,
                    cached_tokens=2 if place == 0 else 0,
                    prompt_logprobs=_prompt_logprobs(request) if place == 0 and choice == 0 else None,
                    speculation=stats if last else None,
                )

    return script


def _logprobs(request: GenerateRequest, tokens: Sequence[int]) -> tuple[TokenLogprobs, ...] | None:
    count = request.params.logprobs
    if count is None:
        return None
    return tuple(scored(t, -0.25 * (t % 7), [(t + 1 + k, -1.0 - k) for k in range(count)]) for t in tokens)


def _prompt_logprobs(request: GenerateRequest) -> tuple[TokenLogprobs | None, ...] | None:
    if request.params.prompt_logprobs is None:
        return None
    return (None, *(scored(token, -2.0) for token in request.prompt_ids[1:]))


def fake(script: Script = echo_script, info: EngineInfo = INFO) -> FakeEngineClient:
    return FakeEngineClient(info, script)


def _served(template: str | None) -> Tokenizer:
    return tokenizer() if template is None else Tokenizer.load(DEMO, chat_template=template)


@contextlib.contextmanager
def api(
    client: EngineClient | Script = echo_script, settings: ServerSettings = SETTINGS, template: str | None = None
) -> Iterator[TestClient]:
    """A client of the application, without a port. A script stands for a fake engine that plays it."""
    engine = client if not callable(client) else fake(client)
    yield TestClient(build_app(engine, _served(template), settings), raise_server_exceptions=False)


@contextlib.contextmanager
def live(
    client: EngineClient | Script = echo_script, settings: ServerSettings = SETTINGS, template: str | None = None
) -> Iterator[str]:
    """The application behind uvicorn on a free port, in a thread; its base URL."""
    engine = client if not callable(client) else fake(client)
    server = http_server(build_app(engine, _served(template), settings), settings.limits)
    # the server's own: a socket made without its protocol's number is one that asyncio leaves Nagle's algorithm on, and
    # an answer in two pieces waits 40 ms for the client's acknowledgement
    with listen(Address("127.0.0.1", 0), settings.limits.write_timeout) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether the condition comes true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The payloads of a stream; checks its frame and its end."""
    assert response.status_code == 200, response.text
    *frames, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(frame.startswith("data: ") for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]
