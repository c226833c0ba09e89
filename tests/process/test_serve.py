"""The whole server as a user runs it: the demo models, both drafters, real clients, signals, a killed engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.harness import events, eventually
from tests.process.serving import COMMAND, DEMO, EXIT_SECONDS, ROOT, Served, run, serving

pytestmark = pytest.mark.process

PROMPT = "def fib(n):\n"
LONG = {"prompt": PROMPT, "max_tokens": 1000, "ignore_eos": True, "seed": 1, "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(*DEMO, "--served-model-name", "demo", "other") as served:
        yield served


def complete(server: Served, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, **body}, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_curl_shows_tokens_as_they_are_made(server: Served) -> None:
    body = '{"prompt": "def fib(n):", "max_tokens": 200, "ignore_eos": true, "stream": true}'
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        arrived = [(time.monotonic(), line) for line in curl.stdout if line.strip()]
    assert arrived[-1][1] == "data: [DONE]\n"
    assert len(arrived) > 20
    middle = arrived[len(arrived) // 2][0]
    assert arrived[0][0] < middle < arrived[-1][0]
    assert arrived[-1][0] - arrived[0][0] > 0.05


def test_stream_and_whole_answer_and_plain_decoding_say_the_same(server: Served) -> None:
    ask = {"max_tokens": 40, "temperature": 0.8, "seed": 5}
    whole = complete(server, **ask)
    plain = complete(server, **ask, speculation=False)
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, **ask, "stream": True}, timeout=60)
    streamed = "".join(chunk["choices"][0]["text"] for chunk in events(response))
    assert whole["choices"][0]["text"] == plain["choices"][0]["text"] == streamed
    assert whole["usage"]["speculation"]["drafted"] > 0
    assert plain["usage"]["speculation"]["drafted"] == 0
    assert plain["usage"]["speculation"]["tokens_per_step"] == 1.0


def test_a_lossy_request_says_so_and_changes_no_other(server: Served) -> None:
    ask = {"max_tokens": 60, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    alone = complete(server, **ask)
    rule = {"rule": "typical", "epsilon": 0.05, "bonus": "argmax"}
    with ThreadPoolExecutor(2) as pool:
        lossy = pool.submit(complete, server, **ask, speculation={"acceptance": rule})
        beside = pool.submit(complete, server, **ask)
    found = [answer["usage"]["speculation"] for answer in (alone, beside.result(), lossy.result())]
    assert [each["acceptance"] for each in found] == ["exact", "exact", "typical"]
    assert [each["lossy"] for each in found] == [False, False, True]
    assert beside.result()["choices"][0]["text"] == alone["choices"][0]["text"]
    assert lossy.result()["choices"][0]["text"] != alone["choices"][0]["text"]
    assert found[2]["accepted"] > 0


def test_uncoupled_drafts_make_the_same_text(server: Served) -> None:
    ask = {"max_tokens": 60, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    coupled, uncoupled = complete(server, **ask), complete(server, **ask, speculation={"coupling": False})
    assert coupled["choices"][0]["text"] == uncoupled["choices"][0]["text"]
    assert coupled["usage"]["speculation"]["by_drafter"] != uncoupled["usage"]["speculation"]["by_drafter"]


def test_openai_client_on_both_endpoints(server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)
    lax = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo", "other"]
    done = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, seed=3)
    chunks = list(lax.completions.create(model="other", prompt=PROMPT, max_tokens=20, seed=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.choices[0].text
    messages: Any = [{"role": "user", "content": "import os"}]
    chat = client.chat.completions.create(model="demo", messages=messages, max_tokens=20, seed=3)
    deltas = list(client.chat.completions.create(model="demo", messages=messages, max_tokens=20, seed=3, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == chat.choices[0].message.content


def test_a_forced_call_follows_its_schema_whatever_drafts(server: Served) -> None:
    cities = {"city": {"enum": ["Oslo", "Rome"]}}
    schema = {"type": "object", "properties": cities, "required": ["city"], "additionalProperties": False}
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Rain?"}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": schema}}],
        "parallel_tool_calls": False,
        "seed": 3,
        "max_tokens": 100,
    }
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        told = []
        for speculation in (True, False):
            done = client.chat.completions.create(**asked, tool_choice=choice, extra_body={"speculation": speculation})
            assert done.choices[0].finish_reason == "tool_calls"
            (call,) = done.choices[0].message.tool_calls
            assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
            told.append(call.function.arguments)
        chunks = list(client.chat.completions.create(**asked, tool_choice=choice, stream=True))
        parts = [part.function for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
        assert told == ["".join(part.arguments for part in parts)] * 2


def test_responses_of_the_real_engine(server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, _strict_response_validation=True)
    asked: dict[str, Any] = {"model": "demo", "input": PROMPT, "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        *_, last = stream
    assert last.type == "response.incomplete"
    assert whole.output_text == last.response.output_text != ""
    assert whole.usage.output_tokens == 16


def test_choices_echo_and_logprobs_of_the_real_engine(server: Served) -> None:
    answer = complete(server, n=3, echo=True, logprobs=2, max_tokens=6, seed=2, ignore_eos=True)
    first = complete(server, max_tokens=6, seed=2, ignore_eos=True)["choices"][0]["text"]
    assert answer["choices"][0]["text"] == PROMPT + first
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["token_logprobs"][0] is None
        assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
        starts = [choice["text"][at:].startswith(t) for at, t in zip(logprobs["text_offset"], logprobs["tokens"])]
        assert all(starts)


def test_what_is_told_of_a_text_beside_it(server: Served) -> None:
    """Over the engine's socket: token ids, the prompt's ranks, bans, the trace of the steps."""
    ask: dict[str, Any] = {"max_tokens": 24, "seed": 5, "return_token_ids": True, "speculation": {"trace": True}}
    first = complete(server, **ask, prompt_logprobs=1)
    [choice], steps = first["choices"], first["speculation_trace"][0]["steps"]
    assert len(steps) == first["usage"]["speculation"]["steps"]
    made = []
    for step in steps:
        made += [step["tokens"][node] for node in step["accepted"]] + [step["bonus"]]
    assert [token for token in made if token is not None] == choice["token_ids"]
    assert len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"])
    assert all(entry["rank"] >= 1 for told in choice["prompt_logprobs"][1:] for entry in told.values())

    bans = {**ask, "allowed_token_ids": sorted({*choice["token_ids"][::2], 200, 201, 202})}
    texts = [complete(server, **{**bans, "speculation": on})["choices"][0] for on in (True, False)]
    assert texts[0] == texts[1]
    assert set(texts[0]["token_ids"]) <= set(bans["allowed_token_ids"])


def test_a_stop_string_ends_the_request_in_the_engine(server: Served) -> None:
    answer = complete(server, max_tokens=900, ignore_eos=True, stop=["e"], seed=4)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "e" not in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] < 900
    assert eventually(lambda: server.metrics()["saccade_running"] == 0)


@pytest.mark.parametrize("body", [LONG, {**LONG, "stream": False}, {**LONG, "n": 3}])
def test_a_client_that_leaves_frees_its_pages(server: Served, body: dict[str, Any]) -> None:
    before = server.metrics()["saccade_requests_finished_total"]
    if body["stream"]:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
    else:
        thread = threading.Thread(target=_ask_and_leave, args=(server.url, body))
        thread.start()
        assert eventually(lambda: server.metrics()["saccade_running"] > 0)
        thread.join()
    assert eventually(lambda: server.metrics()["saccade_requests_finished_total"] > before, 20)
    assert eventually(lambda: server.metrics()["saccade_running"] == 0, 20)
    found = server.metrics()
    assert found["saccade_pages_free"] + found["saccade_pages_cached"] == found["saccade_pages_total"]


def _ask_and_leave(url: str, body: dict[str, Any]) -> None:
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.7)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "x " * 3000}, "maximum context length is 1024 tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "speculation": {"depth": 3}}, "did you mean 'max_depth'"),
        ({"prompt": "x", "speculation": {"drafters": ["eagle"]}}, "draft, ngram"),
    ],
)
def test_bad_requests_say_why_and_the_server_goes_on(server: Served, body: dict[str, Any], part: str) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert response.status_code == 400
    assert part in response.json()["error"]["message"]
    assert complete(server, max_tokens=1)["usage"]["completion_tokens"] == 1


def test_the_http_process_has_no_torch(server: Served) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{server.engine_pid()}/maps").read_text()


def test_a_killed_engine_fails_what_runs_once_and_comes_back(server: Served) -> None:
    answers: list[httpx.Response] = []
    streams = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60))
    )
    streams.start()
    assert eventually(lambda: server.metrics()["saccade_running"] > 0)
    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    assert eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503, 1.0)
    streams.join(20)
    if answers[0].status_code == 200:
        errors = [event["error"] for event in events(answers[0]) if "error" in event]
    else:  # it had not said a token yet
        errors = [answers[0].json()["error"]]
    assert [error["code"] for error in errors] == ["engine_dead"]
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert eventually(lambda: httpx.get(f"{server.url}/health").status_code == 200, 60)
    assert server.engine_pid() != engine
    assert complete(server, max_tokens=3, seed=1)["choices"][0]["text"]
    log = "".join(server.log)
    assert "the engine process ended: it was killed by signal 9" in log
    assert "the engine runs again" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_in_time(number: signal.Signals) -> None:
    with serving(*DEMO, "--shutdown-timeout", "1") as server:
        engine = server.engine_pid()
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            status, seconds = server.end(number)
            rest = [line for line in lines if line]
        assert (status, seconds < EXIT_SECONDS) == (0, True), seconds
        assert not Path(f"/proc/{engine}").exists()
        assert rest[-1] == "data: [DONE]"
        assert '"code":"draining"' in rest[-2] or '"finish_reason":"length"' in rest[-2]
        assert "Traceback" not in "".join(server.log)


def test_a_second_ctrl_c_ends_at_once() -> None:
    with serving(*DEMO) as server:
        engine = server.engine_pid()
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response:
            next(response.iter_lines())
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            _, seconds = server.end(signal.SIGINT)
        assert seconds < 1.0
        assert eventually(lambda: not Path(f"/proc/{engine}").exists() or _is_zombie(engine))


def test_an_engine_does_not_outlive_a_killed_server() -> None:
    with serving(*DEMO) as server:
        engine = server.engine_pid()
        server.process.kill()
        server.process.wait()
        assert eventually(lambda: not Path(f"/proc/{engine}").exists() or _is_zombie(engine))


def _is_zombie(pid: int) -> bool:
    """Dead, and nobody has asked how; in a container there may be no init that does."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "no/such/model/at/all", "--port", str(port), seconds=30)
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr
    assert "--port" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("no/such/folder",), ["'no/such/folder'", "folder"]),
        (("demo/target", "--speculate", "eagel"), ["unknown drafter 'eagel'", "did you mean 'eagle'"]),
        (("demo/target", "--speculate", "ngram:max_mach=3"), ["no option 'max_mach'", "max_match"]),
        (("demo/target", "--speculate", "draft=no/such"), ["'no/such'"]),
        (("demo/target", "--chat-template", "nowhere.jinja"), ["--chat-template", "nowhere.jinja"]),
        (("demo/target", "--max-nodes", "64"), ["--max-nodes"]),
        (
            ("demo/target", "--kv-cache-memory", "100TiB"),
            ["does not fit", "lower --kv-cache-memory"],
        ),
        (("docs",), ["docs has no config.json", "folder of a model"]),
        (("",), ["no name", "folder of a model"]),
    ],
)
def test_what_cannot_be_served_is_one_line_that_says_why(args: tuple[str, ...], parts: list[str]) -> None:
    done = run("serve", *args, "--port", "0")
    assert done.returncode == 1
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("saccade: ")]) == 1


def test_generate_prints_the_text_and_how_it_went() -> None:
    args = ("generate", *DEMO, "--prompt", PROMPT, "--seed", "7", "--max-tokens", "24")
    once, again = run(*args), run(*args[:2], *args[6:])  # with both drafters, and with none
    assert once.returncode == again.returncode == 0
    assert once.stdout == again.stdout
    assert once.stdout.strip()
    assert "24 tokens in" in once.stderr
    assert "tokens/step" in once.stderr
    assert once.stderr.rstrip().endswith("seed 7")


def test_generate_says_that_its_text_is_lossy() -> None:
    done = run("generate", *DEMO, "--prompt", PROMPT, "--seed", "7", "--max-tokens", "24", "--acceptance", "typical")
    assert done.returncode == 0
    assert "lossy (typical acceptance)" in done.stderr
    wrong = run("generate", *DEMO, "--prompt", PROMPT, "--acceptance", "typcial")
    assert wrong.returncode == 1
    assert "did you mean 'typical'" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


def test_a_reader_that_has_enough_ends_generate_quietly() -> None:
    command = [*COMMAND, "generate", "demo/target", "--prompt", PROMPT, "--max-tokens", "900", "--temperature", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(30) == 141
    assert said == ""


def test_a_killed_server_leaves_no_files(tmp_path: Path) -> None:
    with serving(*DEMO, TMPDIR=str(tmp_path)) as server:
        assert complete(server, max_tokens=1)["usage"]["completion_tokens"] == 1
        server.process.kill()
        server.process.wait()
    assert not list(tmp_path.iterdir())


def test_starting_loads_no_torch() -> None:
    code = "import sys, server.cli, server.serve, server.app; print(any(m.startswith('torch') for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
