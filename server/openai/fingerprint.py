"""OpenAI's ``system_fingerprint``: it changes when the same request could get another text."""

from __future__ import annotations

import functools
import hashlib
import json
from importlib.metadata import version

from decoding.messages import EngineInfo
from decoding.text import Tokenizer

DIGITS = 12


@functools.cache  # reads files
def server_version() -> str:
    """Of the installed package."""
    return version("saccade")


def fingerprint(info: EngineInfo, tokenizer: Tokenizer, seed: int | None) -> str:
    """A hash of what the text depends on beside the request: the same for all servers that are set up alike.

    Drafters are no part of it, as they are none of the text. Neither are the weights themselves: the model is known by
    its name.

    Args:
        seed: of requests that bring none.
    """
    facts = [
        *(server_version(), info.model, info.max_model_len, info.vocab_size, info.eos_token_ids),
        *(info.dtype, info.device, info.quantization, info.acceptance, info.default_sampling),
        *(info.tensor_parallel_size, tokenizer.chat_source, seed),  # sums over ranks round otherwise
    ]
    return "fp_" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:DIGITS]
