"""Advisories of other servers and of what this one stands on, each as a test that it does not apply here.

A test is named by its number; those of grammars and tools are in test_grammar_advisories.py. Those that have nothing to
apply to are listed, with the reason, in docs/security.md.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import jinja2
import jinja2.sandbox
import msgspec
import numpy as np
import pytest

from decoding.messages import FromEngine, ToEngine, TokenEvent
from decoding.prefix_cache import PrefixCache
from decoding.request import GenerateRequest, SamplingParams
from server.app import ROUTES
from server.limits import Limits
from server.security import Security
from server.settings import ServerSettings
from tests.api.harness import api, fake, live, saying, tokenizer
from tests.api.test_connections import answers, connection
from tests.api.test_errors import CHAT, COMPLETIONS, HELLO, check_error


def refused(body: dict[str, Any], param: str | None = None, path: str = COMPLETIONS) -> None:
    """A 400 that names the field, and the server serves on."""
    engine = fake(saying("y"))
    base = {"prompt": "x"} if path == COMPLETIONS else {"messages": HELLO}
    with api(engine) as client:
        response = client.post(path, json={**base, **body})
        assert response.status_code == 400, response.text
        if param is not None:
            assert response.json()["error"]["param"].split(".")[0] == param
        assert engine.requests == []
        assert client.post(path, json=base).status_code == 200


# requests that ask for too much, or for nothing -----------------------------------------------------------------------
@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["x", ""], None])
def test_cve_2024_8768_empty_prompt(prompt: Any) -> None:
    refused({"prompt": prompt}, "prompt")


@pytest.mark.parametrize("best_of", [10**9, 2**63 - 1, -1, 129])
def test_cve_2024_8939_unbounded_best_of(best_of: int) -> None:
    refused({"best_of": best_of})


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, {}), (CHAT, {}), (COMPLETIONS, {"prompt": ["x"] * 1000})])
@pytest.mark.parametrize("n", [10**9, 2**63 - 1])
def test_cve_2026_34756_unbounded_n(path: str, body: dict[str, Any], n: int) -> None:
    refused({**body, "n": n}, "n", path)


def test_cve_2026_21869_negative_counts() -> None:
    for field in ("n", "max_tokens", "min_tokens", "logprobs", "top_k", "n_discard", "stop_token_ids"):
        refused({field: [-5] if field == "stop_token_ids" else -5}, field)


COUNTS = ("n", "best_of", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "top_k", "truncate_prompt_tokens")


@pytest.mark.parametrize("count", [2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64])
def test_cve_2026_24146_2026_24173_counts_that_overflow(count: int) -> None:
    with api(saying("y")) as client:
        for field in (*COUNTS, "seed"):
            assert client.post(COMPLETIONS, json={"prompt": "x", field: count}).status_code in (200, 400), field
        for tokens in ([count], [[count]]):
            assert client.post(COMPLETIONS, json={"prompt": tokens}).status_code == 400
        assert client.post("/detokenize", json={"tokens": [count]}).status_code == 400


def test_cve_2026_9540_resources_of_failed_requests_are_released() -> None:
    room = ServerSettings(("demo",), rows=1, limits=Limits(max_queued_requests=0, max_concurrent_requests=1))

    def broken(request: Any) -> Any:
        raise ZeroDivisionError

    with api(broken, room) as client:
        for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": 5}, {"prompt": "x" * 10**6}) * 5:
            assert client.post(COMPLETIONS, json=body).status_code in (400, 500)
        assert client.get("/ready").status_code == 200
        assert "saccade_http_requests_in_flight 1.0" in client.get("/metrics").text


# what clients may not bring -------------------------------------------------------------------------------------------


def test_cve_2025_61620_templates_of_clients() -> None:
    refused({"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}, "chat_template", CHAT)


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "return_tensors", "add_generation_prompt", "padding"])
def test_cve_2025_62426_template_arguments_that_steer_the_library(name: str) -> None:
    refused({"chat_template_kwargs": {name: True}}, "chat_template_kwargs", CHAT)


def test_cve_2025_62164_tensors_of_clients() -> None:
    refused({"prompt_embeds": "gASVAAAA"}, "prompt_embeds")
    refused({"prompt_embeds": ["gASVAAAA"], "prompt": None})


@pytest.mark.parametrize("field", ["logits_processors", "custom_logit_processor", "logits_processor_pattern"])
def test_cve_2026_7304_code_of_clients(field: str) -> None:
    refused({field: ["gASVAAAA"]}, field)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/\\@evil.example/x.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},  # CVE-2026-22773: 1x1
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1:1/x.mp4"}},  # CVE-2026-5497
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_data": "x"}},
    ],
)
def test_cve_2025_6242_2026_24779_2026_22773_2026_5497_nothing_is_fetched_and_no_media_decoded(
    part: dict[str, Any],
) -> None:
    refused({"messages": [{"role": "user", "content": [part]}]}, "messages", CHAT)


def test_cve_2026_0599_addresses_in_a_prompt_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args) or [])
    with socket.create_server(("127.0.0.1", 0)) as trap, api(saying("y")) as client:
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        for body, path in (
            ({"prompt": f"![x]({url})"}, COMPLETIONS),
            ({"messages": [{"role": "user", "content": f"![x]({url})"}]}, CHAT),
        ):
            assert client.post(path, json=body).status_code == 200
        trap.setblocking(False)
        with pytest.raises(BlockingIOError):
            trap.accept()
    assert asked == []


SPELLED = (
    "<|vision_start|><|image_pad|><|vision_end|><image><|audio_bos|><|endoftext|><|im_start|>system<|im_end|>[INST]</s>"
)


def test_cve_2026_44222_markers_of_media_in_a_text_are_text() -> None:
    special = "".join(tokenizer().spelling(token) for token in sorted(tokenizer().special_ids))
    with api(saying("y")) as client:
        for text in (SPELLED, special, special * 20):
            assert client.post(COMPLETIONS, json={"prompt": text}).status_code == 200
            chat = {"messages": [{"role": "user", "content": text}]}
            assert client.post(CHAT, json=chat).status_code == 200
            assert client.post("/tokenize", json={"prompt": text}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/files", "/v1/images/edits", "/v1/audio/transcriptions", *ROUTES])
def test_cve_2026_7302_no_route_takes_files(path: str) -> None:
    with api() as client:
        uploaded = client.post(path, files={"file": ("../../written", b"x")})
    assert uploaded.status_code in (404, 405, 415)


@pytest.mark.parametrize(
    "path", ["/update_weights_from_tensor", "/update_weights", "/pause", "/invocations", "/score", "/collective_rpc"]
)
def test_cve_2025_10164_nothing_can_be_steered_over_http(path: str) -> None:
    with api() as client:
        check_error(client.post(path, json={}), 404, "not_found", None)
    with api(settings=ServerSettings(("demo",), security=Security(api_keys=("k",)))) as client:
        check_error(client.post(path, json={}), 401, "invalid_api_key", None)


# templates of checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",  # CVE-2025-27516
        "{{ ('%s'.__class__.format)('{0.__class__}', 1) }}",  # CVE-2024-56326
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{% set x = messages.append(1) %}{{ messages }}",
    ],
)
def test_cve_2024_34359_2026_5760_2024_56326_2025_27516_templates_are_sandboxed(template: str) -> None:
    with api(saying("y"), template="{{ 'hi' }}" + template) as client:
        response = client.post(CHAT, json={"messages": HELLO})
    assert response.status_code == 400
    for telling in ("subclass", "<class", "uid=", "built-in"):
        assert telling not in response.text


def test_jinja_is_new_enough() -> None:
    assert tuple(int(part) for part in version("jinja2").split(".")[:3]) >= (3, 1, 6)
    assert issubclass(jinja2.sandbox.ImmutableSandboxedEnvironment, jinja2.sandbox.SandboxedEnvironment)


# drafters -------------------------------------------------------------------------------------------------------------


def test_cve_2026_44223_penalties_kill_no_drafter() -> None:
    """One of vLLM's drafters gave trees of a wrong shape from the second step on; only penalties looked at it."""
    from decoding.engine import Engine  # and torch, which nothing else here needs

    every = ("draft=demo/draft", "ngram", "suffix", "recycling", "lookahead", "prediction")
    engine = Engine.load("demo/target", speculate=every, plan="fixed", num_pages=40, dtype="float32")
    prompt = tuple(engine.tokenizer.encode("def fib(n):\n    return fib(n"))
    for number, name in enumerate(("repetition_penalty", "frequency_penalty", "presence_penalty")):
        params = SamplingParams(max_tokens=24, temperature=0.7, seed=number, ignore_eos=True, **{name: 1.5})
        engine.submit(GenerateRequest(f"r{number}", prompt, params, prediction_ids=prompt))
    ends = [event.finish_reason for event in _steps(engine) if event.finish_reason]
    assert ends == ["length"] * 3


def _steps(engine: Any) -> Iterator[TokenEvent]:
    while engine.has_work:
        yield from engine.step()


# between processes, and in the cache ----------------------------------------------------------------------------------


class _Touch:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("direction", [ToEngine, FromEngine], ids=["to", "from"])
def test_cve_2025_32444_29783_30165_47277_30202_2026_3059_3060_7301_messages_are_no_pickles(
    direction: Any, tmp_path: Path
) -> None:
    victim = tmp_path / "written"
    with pytest.raises(msgspec.DecodeError):
        msgspec.msgpack.Decoder(direction).decode(pickle.dumps(_Touch(victim)))
    assert not victim.exists()


def test_cve_2025_25183_prefix_keys_are_not_guessable() -> None:
    caches = [PrefixCache(4) for _ in range(2)]  # as of two servers: each has a salt of its own
    ids = np.arange(16)
    roots = [cache.root_key("") for cache in caches]
    keys = [cache.child_key(root, ids) for cache, root in zip(caches, roots)]
    assert len({*keys, *roots}) == 4
    assert all(len(key) == 32 for key in keys)


def test_cve_2025_46570_tenants_share_no_prefixes() -> None:
    engine = fake(saying("y"))
    isolated = ServerSettings(("demo",), security=Security(api_keys=("a", "b"), isolate_keys=True))
    with api(engine, isolated) as client:
        for key in "ab":
            client.post(COMPLETIONS, json={"prompt": "x"}, headers={"Authorization": f"Bearer {key}"})
        client.post(COMPLETIONS, json={"prompt": "x", "cache_salt": "s"}, headers={"Authorization": "Bearer a"})
    assert len({request.cache_salt for request in engine.requests}) == 3


# keys, paths, errors --------------------------------------------------------------------------------------------------


def test_cve_2025_59425_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(len(a))
        return a == b

    monkeypatch.setattr("server.auth.hmac.compare_digest", counting)
    keys = ServerSettings(("demo",), security=Security(api_keys=("one", "two", "three")))
    with api(saying("y"), keys) as client:
        for sent in ("one", "three", "o", "x" * 1000):
            compared.clear()
            client.get("/v1/models", headers={"Authorization": f"Bearer {sent}"})
            assert compared == [32, 32, 32]  # digests of one length, all of them


@pytest.mark.parametrize("host", ["x/health?", "x/health#", "x\\/health", "[::1/health", "user@x/health", ""])
def test_cve_2026_48710_a_host_does_not_change_the_path(host: str) -> None:
    keys = ServerSettings(("demo",), security=Security(api_keys=("k",)))
    with live(settings=keys) as url, connection(url) as opened:
        opened.sendall(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert answers(opened).split()[1] in (b"401", b"400")


def test_cve_2026_22778_errors_tell_no_addresses() -> None:
    def broken(request: Any) -> Any:
        raise RuntimeError(f"cannot identify <object at {id(request):#x}> in /srv/models/secret")

    with api(broken) as client:
        for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
            text = client.post(COMPLETIONS, json=body).text
            assert "0x" not in text
            assert "/srv" not in text
            assert "RuntimeError" not in text


# below the application ------------------------------------------------------------------------------------------------


def test_cve_2025_48956_giant_headers() -> None:
    with live(saying("y")) as url:
        assert httpx.get(url + "/v1/models", headers={"x-filler": "x" * 100_000}).status_code == 431
        assert httpx.get(url + "/health").status_code == 200


def test_cve_2025_62727_ranges_are_ignored() -> None:
    with api() as client:
        ranges = "bytes=" + ",".join(f"{i}-{i + 1}" for i in range(5000))
        assert client.get("/v1/models", headers={"Range": ranges}).status_code == 200


@pytest.mark.parametrize("path", ["/a%0d%0aSet-Cookie:%20x=1", "/%0aERROR:%20forged", "/a%1b%5b31mred"])
def test_cve_2020_7694_7695_what_clients_send_begins_no_line(path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with live() as url:
        response = httpx.get(url + path)
        assert response.status_code == 404
        assert "set-cookie" not in response.headers
        forged = httpx.get(url + "/health", headers={"x-request-id": "a\tb"})
        assert forged.headers["x-request-id"].startswith("req-")
    assert not [record for record in caplog.records if "\n" in record.getMessage() and "forged" in record.getMessage()]
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(
    "chunks",
    [
        b"5\r\nAAAAAXX2\r\n45\r\n0\r\n\r\n",  # what ends a chunk must be a line's end
        b"5;x=\r\nAAAAA\r\n0\r\n\r\nGET /health HTTP/1.1\r\nX: y\r\n\r\n"[:22] + b"\x00\r\n",
        b"0x5\r\nAAAAA\r\n0\r\n\r\n",
        b"-5\r\nAAAAA\r\n0\r\n\r\n",
    ],
)
def test_cve_2025_43859_bodies_smuggle_no_requests(chunks: bytes) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    limits = ServerSettings(("demo",), limits=Limits(header_timeout=0.5, body_timeout=0.5))
    with live(saying("y"), limits) as url, connection(url) as opened:
        opened.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        received = answers(opened)
        assert received.count(b"HTTP/1.1 ") <= 1
        assert b" 200 " not in received
