"""``transformers.generate``, plain, assisted by a draft model, and with prompt lookup, as systems to be measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig
from transformers.utils import logging as transformers_logging

from benchmarks.measure import Run, Task
from benchmarks.systems import checked_tokens, digest
from benchmarks.tuning import Trial, tune

LOOKUP_TOKENS = 10


@dataclass(frozen=True)
class TransformersSetting:
    """How ``generate`` is called."""

    threads: int | None = None  # None: as many as torch has
    options: Mapping[str, Any] = field(default_factory=dict)  # of generate
    assistant: Mapping[str, Any] = field(default_factory=dict)  # of the draft model's generation config

    @property
    def label(self) -> str:
        words = [] if self.threads is None else [f"threads={self.threads}"]
        words += [f"{name}={_shown(value)}" for name, value in {**self.options, **self.assistant}.items()]
        return " ".join(words)


class StepCounter:
    """Counts the forward passes of a model, by a hook: about a microsecond each."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._forward)

    def _forward(self, module: torch.nn.Module, args: Any) -> None:
        self.count += 1


@dataclass(frozen=True)
class Loaded:
    """Models of transformers that several systems share."""

    model: Any
    assistant: Any | None
    steps: StepCounter

    @classmethod
    def load(cls, target: str, draft: str | None, dtype: str, device: str = "cpu") -> Loaded:
        """
        Args:
            dtype: a dtype's name, or "auto" for the checkpoint's.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        model = load_peer_model(target, dtype).to(device)
        assistant = None if draft is None else load_peer_model(draft, dtype).to(device)
        return cls(model, assistant, StepCounter(model))


class TransformersSystem:
    """One way of calling ``generate``.

    It draws from the whole vocabulary (no top-k), as our requests do. The models' end-of-sequence id is taken away
    (see ``load_peer_model``), which is cheaper for transformers than ``min_new_tokens``.
    """

    peer = True
    batch = 1

    def __init__(self, name: str, loaded: Loaded, setting: TransformersSetting) -> None:
        self.name = name
        self.chosen = setting
        self.setting = setting.label
        self._loaded = loaded

    def run(self, task: Task) -> Run:
        (case,) = task.cases
        model, steps = self._loaded.model, self._loaded.steps
        self._prepare_assistant()
        torch.manual_seed(case.seed)
        with threads_of_torch(self.chosen.threads):
            before = steps.count
            started = time.perf_counter()
            ids = torch.tensor([case.ids], device=model.device)
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=task.tokens,
                **_sampling(task.temperature),
                **self._options(),
            )
            made = out[0, ids.shape[1] :].tolist()
            seconds = time.perf_counter() - started
        return Run(
            system=self.name,
            round=task.round,
            temperature=task.temperature,
            prompts=(case.index,),
            seconds=seconds,
            tokens=checked_tokens(self.name, task, [made]),
            steps=steps.count - before,
            texts=(digest(made),),
        )

    @property
    def dtype(self) -> str:
        return str(self._loaded.model.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Nothing: the models are shared, and go when the last system does."""

    def _options(self) -> dict[str, Any]:
        assistant = {"assistant_model": self._loaded.assistant} if self.chosen.assistant else {}
        return {**self.chosen.options, **assistant}

    def _prepare_assistant(self) -> None:
        # generate moves these while it runs, and the draft model is shared: each run begins with its own
        if self._loaded.assistant is not None:
            for name, value in self.chosen.assistant.items():
                setattr(self._loaded.assistant.generation_config, name, value)


@contextlib.contextmanager
def threads_of_torch(count: int | None) -> Iterator[None]:
    """Torch's threads for a while; None leaves them."""
    before = torch.get_num_threads()
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def load_transformers(
    target: str,
    draft: str | None,
    dtype: str,
    threads: int,
    *,
    device: str = "cpu",
    trial: Trial | None = None,
) -> list[TransformersSystem]:
    """The ways of ``generate`` over one loaded model: "hf", "hf-lookup" and, with a draft model, "hf-assisted".

    Args:
        target, draft: folders or hub ids.
        dtype: a dtype's name, or "auto" for the checkpoint's.
        threads: at most.
        trial: what each is tuned on; None: transformers' defaults, untuned.
    """
    loaded = Loaded.load(target, draft, dtype, device)

    def best(name: str, settings: Sequence[TransformersSetting]) -> TransformersSystem:
        if trial is None:
            return TransformersSystem(name, loaded, settings[0])
        return tune({each.label: partial(TransformersSystem, name, loaded, each) for each in settings}, trial)

    plain = best("hf", _plain_settings(threads, device))
    base = TransformersSetting(plain.chosen.threads)  # assisted decoding takes neither a static cache nor compilation
    systems = [plain, best("hf-lookup", _lookup_settings(base))]
    if draft is not None:
        systems.append(best("hf-assisted", _assisted_settings(base)))
    return systems


def load_peers(target: str, draft: str, dtype: str) -> tuple[list[TransformersSystem], str]:
    """The three ways of ``generate`` untuned, and the dtype they got."""
    systems = load_transformers(target, draft, dtype, torch.get_num_threads())
    return systems, systems[0].dtype


def load_peer_model(folder: str, dtype: str) -> Any:
    """A model of transformers that never ends a text by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    return model.eval()


def _plain_settings(threads: int, device: str) -> list[TransformersSetting]:
    """Threads, and the static cache; compiled on CUDA alone.

    On a CPU compiling the demo target took 50 s, and a compiled step then four times as long as a plain one.
    """
    settings = [TransformersSetting(count) for count in sorted({threads, 1}, reverse=True)]
    settings += [replace(each, options={"cache_implementation": "static"}) for each in settings]
    if torch.device(device).type == "cuda":
        options = {"cache_implementation": "static", "compile_config": CompileConfig(mode="reduce-overhead")}
        settings.append(TransformersSetting(threads, options))
    return settings


def _lookup_settings(base: TransformersSetting) -> list[TransformersSetting]:
    sizes = [(LOOKUP_TOKENS, 2), (3, 2), (5, 2), (10, 3), (3, 3)]  # the first is the usual one
    return [
        replace(base, options={"prompt_lookup_num_tokens": drafted, "max_matching_ngram_size": equal})
        for drafted, equal in sizes
    ]


def _assisted_settings(base: TransformersSetting) -> list[TransformersSetting]:
    """How many tokens, fixed or moving, and how sure of each; transformers' defaults come first."""
    ways = [(20, "constant", 0.4), (4, "constant", 0.0), (4, "constant", 0.4), (8, "constant", 0.0)]
    ways += [(8, "constant", 0.4), (4, "heuristic_transient", 0.0), (4, "heuristic_transient", 0.4)]
    names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
    return [replace(base, assistant=dict(zip(names, way, strict=True))) for way in ways]


def _shown(value: Any) -> str:
    return f"compiled ({value.mode})" if isinstance(value, CompileConfig) else str(value)


def _sampling(temperature: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
