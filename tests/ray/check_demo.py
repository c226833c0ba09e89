"""Two replicas of the demo model behind one address: ``make test-ray``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.api.harness import eventually
from tests.ray.cluster import Cluster, Stream, cluster

FLAGS = "demo/target --speculate draft=demo/draft --speculate ngram --plan fixed --kv-cache-memory 128MiB"
PROMPT = "def fib(n):\n"
LONG = "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\n\n" * 6  # some 180 tokens
SPILL = 2


@pytest.fixture(scope="module")
def demo() -> Iterator[Cluster]:
    with cluster(f"{FLAGS} --served-model-name demo", max_imbalance=SPILL) as started:
        yield started


def cached(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_the_official_client_is_served_as_by_one_server(demo: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{demo.url}/v1", api_key="x", max_retries=0, _strict_response_validation=True)
    assert [model.id for model in client.models.list()] == ["demo"]
    asked: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "import os\n"}], "seed": 3}
    whole = client.chat.completions.create(**asked, max_tokens=30)
    chunks = list(client.chat.completions.create(**asked, max_tokens=30, stream=True))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == whole.choices[0].message.content != ""
    with client.responses.stream(model="demo", input=PROMPT, max_output_tokens=12) as stream:
        *_, last = stream
    assert last.type == "response.incomplete"
    schema: dict[str, Any] = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema, "strict": True}}
    held = client.chat.completions.create(**asked, max_tokens=60, response_format=form)
    assert json.loads(held.choices[0].message.content or "") == {"city": "Oslo"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, temperature=-1)
    assert (refused.value.param, refused.value.code) == ("temperature", "invalid_value")
    assert refused.value.request_id is not None


def test_chunks_arrive_as_they_are_made(demo: Cluster) -> None:
    stream = Stream(demo.url, prompt=PROMPT, max_tokens=300, ignore_eos=True, seed=1)
    stream.join()
    assert stream.whole
    assert len(stream.times) > 30
    began, middle, end = stream.times[0], stream.times[len(stream.times) // 2], stream.times[-1]
    assert end - began > 0.1
    assert began < middle < end


def test_what_repeats_goes_to_one_replica_and_is_in_its_cache(demo: Cluster) -> None:
    asked = {"prompt": LONG, "max_tokens": 4, "seed": 1}
    answers = [demo.complete(**asked) for _ in range(5)]
    assert len({answer.headers["x-saccade-replica"] for answer in answers}) == 1
    assert cached(answers[0]) == 0
    assert all(cached(answer) > 100 for answer in answers[1:])
    longer = demo.complete(**{**asked, "prompt": LONG + "def more():\n"})
    assert longer.headers["x-saccade-replica"] == answers[0].headers["x-saccade-replica"]
    assert cached(longer) > 100


def test_salts_share_nothing_and_the_text_is_the_same_on_every_replica(demo: Cluster) -> None:
    texts, replicas = set(), set()
    for salt in range(16):
        asked = {"prompt": LONG, "max_tokens": 24, "seed": 5, "temperature": 0.8, "cache_salt": f"salt {salt}"}
        first, again = demo.complete(**asked), demo.complete(**asked)
        assert (cached(first), cached(again) > 100) == (0, True)
        assert first.headers["x-saccade-replica"] == again.headers["x-saccade-replica"]
        texts |= {first.json()["choices"][0]["text"], again.json()["choices"][0]["text"]}
        replicas.add(first.headers["x-saccade-replica"])
    assert len(replicas) == 2
    assert len(texts) == 1


def test_a_replica_with_too_much_to_do_passes_requests_on(demo: Cluster) -> None:
    asked = {"prompt": f"# hot\n{LONG}", "max_tokens": 500, "ignore_eos": True}
    streams = []
    for _ in range(8):
        streams.append(Stream(demo.url, **asked))
        streams[-1].begun.wait(60)
    for stream in streams:
        stream.join()
    assert all(stream.whole for stream in streams)
    by_replica = [sum(s.replica == name for s in streams) for name in {s.replica for s in streams}]
    assert len(by_replica) == 2
    assert min(by_replica) >= 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(demo: Cluster, stream: bool) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1000, "ignore_eos": True, "stream": stream, "n": 3}
    ports = demo.replicas().values()
    before = sum(demo.metric(port, "saccade_requests_finished_total") for port in ports)
    if stream:
        with httpx.stream("POST", f"{demo.url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{demo.url}/v1/completions", json=body, timeout=1.0)
    assert eventually(lambda: sum(demo.metric(port, "saccade_running") for port in ports) == 0, 20)
    assert sum(demo.metric(port, "saccade_requests_finished_total") for port in ports) == before + 3
    tokens = sum(demo.metric(port, "saccade_generated_tokens_total") for port in ports)
    time.sleep(0.5)
    assert sum(demo.metric(port, "saccade_generated_tokens_total") for port in ports) == tokens


def test_a_replica_can_be_asked_by_name(demo: Cluster) -> None:
    for name in demo.replicas():
        answers = [demo.http.get("/metrics", headers={"x-saccade-replica": name}) for _ in range(3)]
        assert {answer.headers["x-saccade-replica"] for answer in answers} == {name}
        assert "saccade_ready 1.0" in answers[0].text
    assert demo.http.get("/-/healthz").text == "success"
