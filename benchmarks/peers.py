"""``transformers.generate``, plain, assisted by a draft model, and with prompt lookup, as systems to be measured."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.measure import Run, Task
from benchmarks.systems import checked_tokens, digest

LOOKUP_TOKENS = 10


class StepCounter:
    """Counts the forward passes of a model, by a hook: about a microsecond each."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._forward)

    def _forward(self, module: torch.nn.Module, args: Any) -> None:
        self.count += 1


class TransformersSystem:
    """One way of calling ``generate``.

    It draws from the whole vocabulary (no top-k), as our requests do. The models' end-of-sequence id is taken away
    (see ``load_peer_model``), which is cheaper for transformers than ``min_new_tokens``.
    """

    peer = True
    batch = 1

    def __init__(self, name: str, model: Any, steps: StepCounter, options: dict[str, Any]) -> None:
        self.name = name
        self._model = model
        self._steps = steps
        self._options = options

    def run(self, task: Task) -> Run:
        (case,) = task.cases
        torch.manual_seed(case.seed)
        before = self._steps.count
        started = time.perf_counter()
        ids = torch.tensor([case.ids])
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task.tokens,
            **_sampling(task.temperature),
            **self._options,
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
            steps=self._steps.count - before,
            texts=(digest(made),),
        )


def load_peers(target: str, draft: str, dtype: str) -> tuple[list[TransformersSystem], str]:
    """The three ways of ``generate`` over one loaded model, and the dtype it got.

    Args:
        dtype: a dtype's name, or "auto" for the checkpoint's.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, assistant = load_peer_model(target, dtype), load_peer_model(draft, dtype)
    steps = StepCounter(model)
    ways: dict[str, dict[str, Any]] = {
        "hf": {},
        "hf-assisted": {"assistant_model": assistant},
        "hf-lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
    }
    systems = [TransformersSystem(name, model, steps, options) for name, options in ways.items()]
    return systems, str(model.dtype).removeprefix("torch.")


def load_peer_model(folder: str, dtype: str) -> Any:
    """A model of transformers that never ends a text by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    return model.eval()


def _sampling(temperature: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
