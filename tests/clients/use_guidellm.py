"""GuideLLM, which benchmarks over streams and is exact about their form: their end, usage, errors in the middle."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from judge import FAIL_MIDWAY, MODEL, TARGET, Judge, arguments, command, succeeded

REQUESTS, OUTPUT_TOKENS = 24, 16


def benchmark(args: Namespace, url: str, path: str, data: str, out: Path, requests: int = REQUESTS) -> dict[str, Any]:
    """The one benchmark of GuideLLM's report."""
    backend = {"kind": "openai_http", "target": url, "model": MODEL, "api_key": args.key, "request_format": path}
    done = command(
        *("guidellm", "run", "--backend", json.dumps(backend), "--data", data, "--disable-console-interactive"),
        *("--tokenizer", f"kind=huggingface_auto,model={TARGET}", "--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={requests}", "--output", f"kind=json,path={out}"),
    )
    succeeded(done)
    (found,) = json.loads(out.read_text())["benchmarks"]
    return found


def totals(found: dict[str, Any]) -> tuple[int, int]:
    """(successful, errored) requests."""
    counted = found["metrics"]["request_totals"]
    return counted["successful"], counted["errored"]


def main() -> None:
    args, judge = arguments(__doc__), Judge()
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
        with judge(f"{path}: every request succeeds, with the tokens asked for"):
            out = args.out / f"{path.strip('/').replace('/', '-')}.json"
            data = f"kind=synthetic_text,prompt_tokens=48,output_tokens={OUTPUT_TOKENS}"
            found = benchmark(args, args.demo, path, data, out)
            assert totals(found) == (REQUESTS, 0), totals(found)
            made = found["metrics"]["output_token_count"]["successful"]
            assert (made["min"], made["max"]) == (OUTPUT_TOKENS, OUTPUT_TOKENS), made
            assert found["metrics"]["time_to_first_token_ms"]["successful"]["mean"] > 0
    with judge("errors in mid-stream are counted as errors"):
        prompts = args.out / "failing.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"{FAIL_MIDWAY} {n}"}) + "\n" for n in range(8)))
        out = args.out / "failing-report.json"
        found = benchmark(args, args.scripted, "/v1/completions", f"kind=json_file,path={prompts}", out, requests=8)
        assert totals(found) == (0, 8), totals(found)
    judge.end()


if __name__ == "__main__":
    main()
