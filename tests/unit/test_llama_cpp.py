"""llama.cpp's server as a system, with a small program in its place that speaks as it does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.llama_cpp import (
    LlamaFiles,
    LlamaServer,
    Tuner,
    completion_body,
    find_server,
    gguf_of,
    load_llama,
    read_answer,
    server_command,
    server_version,
)
from benchmarks.llama_settings import (
    LlamaSetting,
    both_ways,
    draft_way,
    draft_ways,
    machine_settings,
    ngram_way,
    ngram_ways,
)
from benchmarks.measure import Case, Task
from benchmarks.systems import digest
from benchmarks.tuning import Trial
from decoding.errors import ConfigError
from tests.parity.tiny import save_tiny

ROOT = Path(__file__).parents[2]
# counts up from the prompt's last token; its settings are the words of its command line
PROGRAM = """\
#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

words = sys.argv[1:]
if "--version" in words:
    sys.exit(print("version: 0.0.0 (fake)"))
if {picky} and words[words.index("--flash-attn") + 1] == "off":
    sys.exit("error: this setting cannot be")
seen = {{"decodes": 0, "drafted": 0}}

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        text = "ok" if self.path == "/health" else "\\n".join([
            "# HELP llamacpp:n_decode_total steps",
            f"llamacpp:n_decode_total {{seen['decodes']}}",
            f"llamacpp:spec_decode_num_draft_tokens_total {{seen['drafted']}}",
            f"llamacpp:spec_decode_num_accepted_tokens_total {{seen['drafted'] // 2}}",
            'llamacpp:labelled{{position="0"}} 7'])
        self.answer(text.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first = body["prompt"][-1] + 1
        seen["decodes"] += body["n_predict"]
        seen["drafted"] += 2 * ("--spec-type" in words)
        tokens = [first + place for place in range(body["n_predict"])]
        self.answer(json.dumps({{"tokens": tokens, "timings": {{"prompt_ms": 2.0, "predicted_ms": 3.0}}}}).encode())

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass

ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


def build_fake(folder: Path, *, picky: bool = False) -> Path:
    program = folder / "bin" / "llama-server"
    program.parent.mkdir(parents=True)
    program.write_text(PROGRAM.format(python=sys.executable, picky=picky))
    program.chmod(0o755)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> LlamaFiles:
    server = find_server(build_fake(tmp_path / "build"))
    return LlamaFiles(server, tmp_path / "target.gguf", tmp_path / "draft.gguf", "f16", context=128)


@pytest.fixture
def running(files: LlamaFiles) -> Iterator[LlamaServer]:
    server = LlamaServer("llama", files, LlamaSetting(1), batch=2)
    yield server
    server.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def task(*lasts: int, tokens: int = 4) -> Task:
    return Task(3, 0.0, tuple(Case(index, (1, last), seed=7) for index, last in enumerate(lasts)), tokens)


def test_texts_steps_and_times_are_the_servers(running: LlamaServer) -> None:
    run = running.run(task(10, 20))
    assert run.texts == (digest([11, 12, 13, 14]), digest([21, 22, 23, 24]))
    assert (run.system, run.round, run.prompts, run.tokens, run.steps) == ("llama", 3, (0, 1), 8, 8)
    assert (run.drafted, run.accepted) == (0, 0)
    assert run.own_seconds == pytest.approx(0.005)
    assert run.seconds > 0
    assert running.run(task(10, 20)).steps == 8  # of this run alone


def test_it_ends_when_it_is_closed(files: LlamaFiles) -> None:
    server = LlamaServer("llama", files, LlamaSetting(1))
    pid = server.pid
    assert alive(pid)
    server.close()
    server.close()
    assert not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel does not end children")
def test_it_ends_with_us_even_when_we_are_killed(files: LlamaFiles) -> None:
    script = f"""\
import time
from pathlib import Path
from benchmarks.llama_cpp import LlamaFiles, LlamaServer, LlamaSetting
files = LlamaFiles(Path({str(files.server)!r}), Path("target.gguf"), None, "f16", 128)
print(LlamaServer("llama", files, LlamaSetting(1)).pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as ours:
        assert ours.stdout is not None
        pid = int(ours.stdout.readline())
        ours.kill()
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_what_remembers_texts_begins_anew_for_each_task(files: LlamaFiles) -> None:
    way = ngram_way("ngram-map-k", 3, 8, remembers=True)
    server = LlamaServer("llama-ngram", files, LlamaSetting(1, speculation=way))
    try:
        first = server.pid
        server.run(task(10))
        assert server.pid == first
        run = server.run(task(10))
        assert server.pid != first
        assert not alive(first)
        assert (run.drafted, run.accepted) == (2, 1)
    finally:
        server.close()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    program = find_server(build_fake(tmp_path / "build", picky=True))
    files = LlamaFiles(program, tmp_path / "target.gguf", None, "f16", context=128)
    with pytest.raises(ConfigError, match="ended with status 1: error: this setting cannot be"):
        LlamaServer("llama", files, LlamaSetting(1, flash_attention=False))


def test_the_version_is_what_it_says(files: LlamaFiles) -> None:
    assert server_version(files.server.parents[1]) == "version: 0.0.0 (fake)"


def test_without_a_build_the_fix_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="build it with: make llama-cpp"):
        find_server(tmp_path)


def test_the_command_line_gives_each_request_a_slot_and_keeps_nothing(files: LlamaFiles) -> None:
    command = server_command(files, LlamaSetting(2, speculation=draft_way(4, 0.4)), batch=8, port=4711)
    words = {word: after for word, after in zip(command, [*command[1:], ""], strict=True) if word.startswith("--")}
    assert (words["--parallel"], words["--ctx-size"], words["--threads"], words["--port"]) == ("8", "1024", "2", "4711")
    assert (words["--spec-draft-n-max"], words["--spec-draft-p-min"]) == ("4", "0.4")
    assert words["--spec-draft-model"] == str(files.draft)
    assert words["--cache-ram"] == "0"
    assert "--no-cache-prompt" in words
    with pytest.raises(ConfigError, match="needs a draft model"):
        server_command(replace(files, draft=None), LlamaSetting(2, speculation=draft_way(4, 0.4)), batch=1, port=1)


def test_a_request_asks_for_the_same_work_as_ours() -> None:
    greedy = completion_body((1, 2), 5, task(0))
    assert (greedy["prompt"], greedy["n_predict"], greedy["cache_prompt"]) == ([1, 2], 4, False)
    assert (greedy["samplers"], greedy["top_k"]) == (["top_k"], 1)
    drawn = completion_body((1, 2), 5, replace(task(0), temperature=0.8))
    assert (drawn["samplers"], drawn["temperature"], drawn["seed"]) == (["temperature"], 0.8, 5)


@pytest.mark.parametrize("content", [b"not json", b"[]", b"{}", b'{"tokens": [1], "timings": {}}'])
def test_an_answer_without_tokens_is_an_error(content: bytes) -> None:
    with pytest.raises(RuntimeError, match="no tokens or timings"):
        read_answer(content)


def test_settings_are_told_apart_by_their_labels() -> None:
    ways = [*draft_ways(), *ngram_ways(), both_ways(draft_way(3, 0.0), ngram_way("ngram-simple", 3, 8))]
    settings = [*machine_settings(2), *(LlamaSetting(2, speculation=way) for way in ways)]
    assert len({setting.label for setting in settings}) == len(settings)
    both = ways[-1]
    assert both.drafts
    assert both.flags[1] == "draft-simple,ngram-simple"
    assert len(machine_settings(1)) == 2


def test_a_model_is_written_once_and_again_when_it_changes(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    first = gguf_of(folder, "float32", tmp_path / "files")
    written = first.stat().st_mtime_ns
    assert gguf_of(folder, "float32", tmp_path / "files") == first
    assert first.stat().st_mtime_ns == written
    save_tiny("llama", folder, seed=2)
    assert gguf_of(folder, "float32", tmp_path / "files") != first


def test_all_ways_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # GGUF files go below the working directory
    build = build_fake(tmp_path / "fake")
    target, draft = save_tiny("llama", tmp_path / "t"), save_tiny("llama", tmp_path / "d", num_hidden_layers=1)
    systems = load_llama(str(target), str(draft), "auto", 1, build)
    try:
        assert [system.name for system in systems] == ["llama", "llama-ngram", "llama-draft", "llama-both"]
        assert systems[0].chosen.speculation is None
        assert systems[3].way == both_ways(systems[2].way, systems[1].way)
        assert [system.run(task(10)).tokens for system in systems] == [4] * 4
    finally:
        for system in systems:
            system.close()


def test_what_fails_last_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: LlamaFiles
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[LlamaServer] = []

    class Third(LlamaServer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if len(started) == 2:
                raise ConfigError("no more")
            super().__init__(*args, **kwargs)
            started.append(self)

    target = save_tiny("llama", tmp_path / "t")
    with pytest.raises(ConfigError, match="no more"):
        load_llama(str(target), str(target), "auto", 1, files.server.parents[1], start=Third)
    assert [alive(server.pid) for server in started] == [False, False]


def test_plain_decoding_is_tuned_twice(files: LlamaFiles) -> None:
    trial = Trial((Case(0, (1, 2), seed=1),), tokens=2)
    tried: list[str] = []

    class Noted(LlamaServer):
        def __init__(self, name: str, files: LlamaFiles, setting: LlamaSetting, batch: int = 1) -> None:
            super().__init__(name, files, setting, batch)
            tried.append(setting.label)

    plain = Tuner(files, 1, trial, Noted).plain(1)
    plain.close()
    assert len(set(tried)) == 2 + 3  # flash attention on and off; two more sizes, and sampling in the graph
    assert plain.setting in tried
