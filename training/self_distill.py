"""The target writes its own training text, for drafters of text like the target's (2401.10774, section 2.3.2).

Our engine continues the prompts, many at a time, with drafters where there are any. A continuation depends on its
prompt and seed alone, so the file is the same however often the work is interrupted and whatever drafts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from decoding.engine import Engine
from decoding.messages import TokenEvent
from decoding.request import GenerateRequest, SamplingParams
from training.data import read_documents
from training.errors import TrainError

PROMPT_TOKENS = 64  # of the prompts cut from plain text
_SEED_STRIDE = 2**32  # prompts a seed; beyond it the seeds of two runs would meet
_OPEN_BATCHES = 2  # requests that wait so that no place in the batch stays empty


@dataclass(frozen=True)
class Writing:
    """What a file of continuations was written from."""

    target: str
    prompts: str  # SHA-256 of the file's bytes
    max_tokens: int
    temperature: float
    seed: int


def distill(
    target: str | Path,
    prompts: Path,
    out: Path,
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    speculate: tuple[str, ...] = (),
    batch: int = 64,
    device: str = "auto",
) -> Path:
    """Continue every prompt into ``out``, from where an interrupted call stopped; at once if that is complete.

    ``out`` is JSONL as ``read_documents`` takes it, in the order of the prompts: "token_ids" of prompt and
    continuation, "prompt_tokens" (no labels), "ended" (the target wrote an end of text, left out here).

    Args:
        prompts: JSONL whose lines are prompts ("prompt", "text" or "token_ids"; the end of one that is too long for
            the context), or plain text, of which every ``max_tokens`` tokens give a prompt of the first 64.
        temperature: 1 for what the target would write, 0 for its greedy text, which loops in small models.
        speculate: drafters, as for ``--speculate``; they change the time only.
        batch: continuations written at one time.

    Raises:
        TrainError: ``out`` was written with other settings, unusable prompts, a full disk (what was written is kept).
        ConfigError: a target or drafter that cannot be loaded.
    """
    writing = Writing(str(target), _digest(prompts), max_tokens, temperature, seed)
    part = out.with_name(out.name + ".part")
    try:
        _claim(out, writing)
        if not out.exists():
            done = _read_part(part)
            engine = Engine.load(str(target), speculate=speculate, max_num_seqs=batch, device=device)
            wanted = list(_prompts(prompts, engine, max_tokens))
            _write(engine, wanted, done, part, writing, _OPEN_BATCHES * batch)
            _finish(part, out)
    except OSError as error:
        raise TrainError(
            f"{out} cannot be written ({error.strerror or error}); what is complete of it is kept. Free some space, "
            "then run the same command again"
        ) from error
    return out


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TrainError(f"the prompts {path} cannot be read ({error.strerror}); check --self-distill") from error


def _claim(out: Path, writing: Writing) -> None:
    """Note what ``out`` is written from, or check that it is this."""
    out.parent.mkdir(parents=True, exist_ok=True)
    note = out.with_name(out.name + ".settings")
    text = json.dumps(asdict(writing), indent=2) + "\n"
    part = out.with_name(out.name + ".part")
    written = out.exists() or (part.exists() and part.stat().st_size > 0)
    if not (note.exists() and written):  # a call that failed before it wrote anything binds nobody
        note.write_text(text, encoding="utf-8")
    elif note.read_text(encoding="utf-8") != text:
        raise TrainError(
            f"{out} holds continuations of other prompts or settings (see {note.name}); give another --out, or delete "
            f"{out.parent / out.name}* to have it written anew"
        )


def _prompts(path: Path, engine: Engine, max_tokens: int) -> Iterator[list[int]]:
    """Token ids of each prompt."""
    room = engine.info.max_model_len - max_tokens
    if max_tokens < 1 or room < 1:
        raise TrainError(
            f"{max_tokens} tokens cannot be written after a prompt: the target's context is "
            f"{engine.info.max_model_len}; lower --distill-tokens"
        )
    found = False
    for document in read_documents([path]):
        if path.suffix == ".jsonl":
            ids = list(document.token_ids) or engine.tokenizer.encode(document.text)
            cut = [ids[-room:]]
        else:
            ids = engine.tokenizer.encode(document.text, add_special_tokens=False)
            cut = [ids[first : first + min(PROMPT_TOKENS, room)] for first in range(0, len(ids), max_tokens)]
        for prompt in cut:
            if prompt:
                found = True
                yield prompt
    if not found:
        raise TrainError(f"{path} holds no prompts; give JSONL with prompts, or text")


def _read_part(part: Path) -> dict[int, str]:
    """Lines of an unfinished file by prompt; a last line that is cut short is taken off the file."""
    if not part.exists():
        return {}
    raw = part.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        part.write_bytes(whole)
    try:
        return {int(json.loads(line)["index"]): line for line in whole.decode("utf-8").splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{part} is damaged ({error}); delete it to have it written anew") from error


def _write(
    engine: Engine, prompts: list[list[int]], done: dict[int, str], part: Path, writing: Writing, limit: int
) -> None:
    """Append a line for each prompt that has none, as its continuation ends; up to ``limit`` are under way."""
    waiting = (index for index in range(len(prompts)) if index not in done)
    texts: dict[int, list[int]] = {}
    with (
        part.open("a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=len(done), desc="self-distillation", unit="text") as bar,
    ):
        try:
            while True:
                while len(texts) < limit and (index := next(waiting, None)) is not None:
                    engine.submit(_request(index, prompts[index], writing))
                    texts[index] = []
                if not texts:
                    return
                for event in engine.step():
                    index = int(event.request_id)
                    texts[index].extend(event.token_ids)
                    if event.finish_reason is not None:
                        file.write(_line(index, prompts[index], texts.pop(index), event))
                        bar.update()
                file.flush()
        finally:
            engine.close()


def _request(index: int, prompt: list[int], writing: Writing) -> GenerateRequest:
    seed = (writing.seed * _SEED_STRIDE + index) % 2**64
    params = SamplingParams(max_tokens=writing.max_tokens, temperature=writing.temperature, seed=seed)
    return GenerateRequest(str(index), tuple(prompt), params)


def _line(index: int, prompt: list[int], written: list[int], last: TokenEvent) -> str:
    if last.finish_reason == "error":
        raise TrainError(f"the target failed at prompt {index}: {last.error}")
    ended = last.finish_reason == "stop"
    ids = prompt + (written[:-1] if ended else written)
    entry: dict[str, Any] = {"index": index, "token_ids": ids, "prompt_tokens": len(prompt), "ended": ended}
    return json.dumps(entry, separators=(",", ":")) + "\n"


def _finish(part: Path, out: Path) -> None:
    """Put the lines in order and the file in place."""
    lines = _read_part(part)
    ordered = out.with_name(out.name + ".ordered")
    try:
        with ordered.open("w", encoding="utf-8") as file:
            file.writelines(lines[index] + "\n" for index in sorted(lines))
            file.flush()
            os.fsync(file.fileno())
        ordered.replace(out)
    finally:
        ordered.unlink(missing_ok=True)
    part.unlink()
