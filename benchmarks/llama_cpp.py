"""llama.cpp's server as a system to be measured: plain, with a draft model, and with n-grams.

``make llama-cpp`` builds it. Prompts go to its native ``/completion`` as token ids, texts come back as token ids, and
the work is ours: nothing is kept of earlier prompts, no sampler but the temperature, an end-of-text token ends nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.child_server import ChildServer, bare_environment, free_port
from benchmarks.gguf_file import LlamaShape, write_gguf
from benchmarks.llama_settings import (
    LlamaSetting,
    Speculation,
    both_ways,
    draft_ways,
    machine_settings,
    ngram_ways,
    prompt_settings,
    speculating,
)
from benchmarks.measure import Run, Task
from benchmarks.provenance import weights_hash
from benchmarks.systems import checked_tokens, digest
from benchmarks.tuning import Trial, tune
from decoding.errors import ConfigError

BUILD = Path("build/llama.cpp")
FILES = Path("build/gguf")
_CACHE_TYPES = {"float32": "f32", "bfloat16": "f16"}  # of K and V; f16 is its default
_DECODES, _DRAFTED, _ACCEPTED = (
    f"llamacpp:{name}"
    for name in ("n_decode_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total")
)


@dataclass(frozen=True)
class LlamaFiles:
    """What the server is started from."""

    server: Path
    target: Path  # GGUF
    draft: Path | None
    cache_type: str
    context: int  # tokens of one request

    @classmethod
    def prepare(cls, target: str, draft: str | None, dtype: str, build: Path = BUILD) -> LlamaFiles:
        """Find the server, and write the models as GGUF unless they are there.

        Raises:
            ConfigError: no server, or a model that cannot be written.
            CheckpointError: no model.
        """
        shape = LlamaShape.read(Path(target))
        dtype = shape.dtype if dtype == "auto" else dtype
        return cls(
            server=find_server(build),
            target=gguf_of(Path(target), dtype),
            draft=None if draft is None else gguf_of(Path(draft), dtype),
            cache_type=_CACHE_TYPES[dtype],
            context=shape.max_position_embeddings,
        )


def find_server(build: Path = BUILD) -> Path:
    """The server's program.

    Raises:
        ConfigError: it is not built.
    """
    program = build / "bin" / "llama-server"
    if not program.is_file():
        raise ConfigError(f"{program} is not there; build it with: make llama-cpp")
    return program.resolve()


def server_version(build: Path = BUILD) -> str:
    """What the server says of itself, for a result's provenance.

    Raises:
        ConfigError: it is not built.
    """
    said = subprocess.run([str(find_server(build)), "--version"], capture_output=True, text=True, check=True)
    return " ".join((said.stdout + said.stderr).split())


def gguf_of(folder: Path, dtype: str, files: Path = FILES) -> Path:
    """The model in ``folder`` as GGUF, written if this very model was not written before.

    Raises:
        ConfigError: a model that cannot be written.
        CheckpointError: no model.
    """
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    out = files / f"{folder.resolve().name}-{(weights_hash(folder) or '')[:12]}-{config[:8]}-{dtype}.gguf"
    if not out.is_file():
        write_gguf(folder, out, dtype)
    return out


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    tokens: list[int]
    seconds: float  # by the server's own account


class LlamaServer:
    """A running llama-server; ``batch`` requests have a slot each."""

    peer = True

    def __init__(self, name: str, files: LlamaFiles, setting: LlamaSetting, batch: int = 1) -> None:
        """Start it.

        Raises:
            ConfigError: it does not start; with what it said.
        """
        self.name = name
        self.batch = batch
        self.chosen = setting
        self.setting = setting.label
        self._files = files
        self._server = self._start()
        self._used = False

    @property
    def pid(self) -> int:
        return self._server.pid

    @property
    def way(self) -> Speculation:
        """How it speculates.

        Raises:
            ValueError: it does not.
        """
        if self.chosen.speculation is None:
            raise ValueError(f"{self.name} does not speculate")
        return self.chosen.speculation

    def run(self, task: Task) -> Run:
        self.forget()
        return self.timed(task)

    def forget(self) -> None:
        """Begin anew if texts of earlier requests are remembered."""
        if self._used and self.chosen.speculation is not None and self.chosen.speculation.remembers:
            self._server.close()
            self._server = self._start()
        self._used = False

    def timed(self, task: Task) -> Run:
        """``run`` with what is remembered."""
        self._used = True
        before = self._server.metrics()
        bodies = [completion_body(case.ids, case.seed, task) for case in task.cases]
        started = time.perf_counter()
        contents = self._server.posts("/completion", bodies)
        seconds = time.perf_counter() - started
        answers = [read_answer(content) for content in contents]
        return _run(self.name, task, answers, seconds, before, self._server.metrics())

    def complete(self, task: Task) -> list[list[int]]:
        """The tokens of each text, untimed."""
        bodies = [completion_body(case.ids, case.seed, task) for case in task.cases]
        return [read_answer(content).tokens for content in self._server.posts("/completion", bodies)]

    def close(self) -> None:
        self._server.close()

    def _start(self) -> ChildServer:
        port = free_port()
        command = server_command(self._files, self.chosen, self.batch, port)
        return ChildServer(command, port, bare_environment(), self.batch)


def server_command(files: LlamaFiles, setting: LlamaSetting, batch: int, port: int) -> list[str]:
    """The command line: one slot with its own K/V for each request, nothing kept of a request that ended."""
    command = [str(files.server), "--host", "127.0.0.1", "--port", str(port), "--offline", "--metrics", "--no-slots"]
    command += ["--model", str(files.target), "--parallel", str(batch), "--ctx-size", str(batch * files.context)]
    command += ["--no-kv-unified", "--no-cache-prompt", "--cache-ram", "0", "--ctx-checkpoints", "0", "--fit", "off"]
    command += ["--cache-type-k", files.cache_type, "--cache-type-v", files.cache_type, *setting.flags]
    if setting.speculation is not None and setting.speculation.drafts:
        if files.draft is None:
            raise ConfigError(f"{setting.label} needs a draft model; name its folder")
        command += ["--spec-draft-model", str(files.draft)]
        command += ["--spec-draft-type-k", files.cache_type, "--spec-draft-type-v", files.cache_type]
    return command


def completion_body(ids: Sequence[int], seed: int, task: Task) -> dict[str, Any]:
    """A request. At temperature 0 the one likeliest token is taken, and no distribution made of it."""
    sampling: dict[str, Any] = {"samplers": ["temperature"], "temperature": task.temperature}
    if task.temperature == 0:
        sampling = {"samplers": ["top_k"], "top_k": 1, "temperature": 0.0}
    return {
        "prompt": list(ids),
        "n_predict": task.tokens,
        "seed": seed,
        "cache_prompt": False,
        "return_tokens": True,
        "response_fields": ["tokens", "timings"],
        **sampling,
    }


def read_answer(content: bytes) -> Answer:
    """The tokens of an answer, and what the server says of its time.

    Raises:
        RuntimeError: an answer without them.
    """
    try:
        answer = json.loads(content)
        timings = answer["timings"]
        milliseconds = float(timings["prompt_ms"]) + float(timings["predicted_ms"])
        return Answer([int(token) for token in answer["tokens"]], milliseconds / 1e3)
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"llama-server gave no tokens or timings: {content[:500]!r}") from error


def _run(
    name: str,
    task: Task,
    answers: Sequence[Answer],
    seconds: float,
    before: dict[str, float],
    after: dict[str, float],
) -> Run:
    return Run(
        system=name,
        round=task.round,
        temperature=task.temperature,
        prompts=tuple(case.index for case in task.cases),
        seconds=seconds,
        tokens=checked_tokens(name, task, [answer.tokens for answer in answers]),
        steps=int(after[_DECODES] - before[_DECODES]),  # of the target; its draft model's are not in it
        texts=tuple(digest(answer.tokens) for answer in answers),
        own_seconds=max(answer.seconds for answer in answers),  # all of them began together
        drafted=int(after[_DRAFTED] - before[_DRAFTED]),
        accepted=int(after[_ACCEPTED] - before[_ACCEPTED]),
    )


def load_llama(
    target: str,
    draft: str | None,
    dtype: str,
    threads: int,
    build: Path = BUILD,
    *,
    batch: int = 1,
    trial: Trial | None = None,
    start: type[LlamaServer] = LlamaServer,
) -> list[LlamaServer]:
    """llama.cpp's server, running: "llama", "llama-ngram" and, with a draft model, "llama-draft" and "llama-both".

    Args:
        target: folder of a Llama model.
        draft: folder of a smaller one with the same vocabulary.
        dtype: bfloat16, float32, or "auto" for the checkpoint's.
        threads: at most.
        batch: requests at once.
        trial: what each is tuned on; None: the first of the settings in ``llama_settings``, untuned.
        start: another kind of server, for tests.

    Raises:
        ConfigError: it is not built, does not start, or cannot have such a model.
        CheckpointError: no model.
    """
    tuner = Tuner(LlamaFiles.prepare(target, draft, dtype, build), batch, trial, start)
    with contextlib.ExitStack() as running:  # what runs is ended if something after it fails
        plain = tuner.plain(threads)
        running.callback(plain.close)
        ngram = tuner.best("llama-ngram", speculating(plain.chosen, ngram_ways()))
        running.callback(ngram.close)
        systems = [plain, ngram]
        if draft is not None:
            drafting = tuner.best("llama-draft", speculating(plain.chosen, draft_ways()))
            running.callback(drafting.close)
            ways = iter([both_ways(drafting.way, ngram.way)])
            systems += [drafting, tuner.best("llama-both", speculating(plain.chosen, ways))]
        running.pop_all()
    return systems


@dataclass(frozen=True)
class Tuner:
    """Starts servers with the best of some settings; without a trial, with the first."""

    files: LlamaFiles
    batch: int
    trial: Trial | None
    start: type[LlamaServer] = LlamaServer

    def plain(self, threads: int) -> LlamaServer:
        """Two times, because all combinations are too many: threads and attention, then prompts and sampling."""
        first = self.best("llama", machine_settings(threads))
        if self.trial is None:
            return first
        first.close()
        return self.best("llama", prompt_settings(first.chosen))

    def best(self, name: str, settings: Sequence[LlamaSetting]) -> LlamaServer:
        if self.trial is None:
            return self.start(name, self.files, settings[0], self.batch)
        starts = {each.label: partial(self.start, name, self.files, each, self.batch) for each in settings}
        return tune(starts, self.trial)
