"""The load generator of vLLM, `vllm bench serve`: no GPU is asked for, and nothing of vLLM's engine is loaded."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from argparse import Namespace
from typing import Any

from judge import MODEL, TARGET, Judge, arguments, idle
from vllm.benchmarks.serve import add_cli_args, main_async

REQUESTS, OUTPUT_TOKENS = 24, 16


def bench(args: Namespace, backend: str, endpoint: str, *options: str) -> dict[str, Any]:
    """The result of a run against the demo."""
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    out = args.out / f"{backend}.json"
    words = ["--backend", backend, "--base-url", args.demo, "--endpoint", endpoint, "--tokenizer", str(TARGET)]
    words += ["--dataset-name", "random", "--random-input-len", "48", "--random-output-len", str(OUTPUT_TOKENS)]
    words += ["--num-prompts", str(REQUESTS), "--max-concurrency", "4", "--ignore-eos"]
    words += ["--save-result", "--result-filename", str(out), *options]
    asyncio.run(main_async(parser.parse_args(words)))
    return json.loads(out.read_text())


def main() -> None:
    args, judge = arguments(__doc__), Judge()
    os.environ["OPENAI_API_KEY"] = args.key
    header = ("--header", f"Authorization=Bearer {args.key}")  # the question for the model's name has no other key
    for backend, endpoint, options in (
        ("openai", "/v1/completions", header),
        ("openai-chat", "/v1/chat/completions", ("--model", MODEL)),
    ):
        with judge(f"{endpoint}: every request succeeds, with the tokens asked for"):
            found = bench(args, backend, endpoint, *options)
            assert (found["completed"], found["failed"]) == (REQUESTS, 0)
            assert found["total_output_tokens"] == REQUESTS * OUTPUT_TOKENS
    with judge("the server is idle afterwards"):
        assert idle(args.demo, args.key)
    judge.end()


if __name__ == "__main__":
    main()
