"""AIPerf, NVIDIA's benchmark of inference servers; with the server's counts, as texts do not always split alike."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from typing import Any

from judge import MODEL, TARGET, Judge, arguments, command, idle, succeeded

REQUESTS, OUTPUT_TOKENS = 24, 16


def profile(args: Namespace, kind: str, *options: str) -> dict[str, Any]:
    """The report of a run against the demo."""
    out = args.out / "-".join([kind, *(option.strip("-") for option in options if option.startswith("--"))])
    done = command(
        *("aiperf", "profile", "--model", MODEL, "--tokenizer", str(TARGET), "--url", args.demo, "--ui", "none"),
        *("--endpoint-type", kind, "--api-key", args.key, "--request-count", str(REQUESTS), "--concurrency", "4"),
        *("--synthetic-input-tokens-mean", "48", "--synthetic-input-tokens-stddev", "0"),
        *("--output-tokens-mean", str(OUTPUT_TOKENS), "--output-tokens-stddev", "0", "--workers-max", "2"),
        *("--extra-inputs", "ignore_eos:true", "--use-server-token-count", "--artifact-dir", str(out), *options),
    )
    succeeded(done)
    return json.loads((out / "profile_export_aiperf.json").read_text())


def main() -> None:
    args, judge = arguments(__doc__), Judge()
    os.environ.pop("HF_HUB_OFFLINE", None)  # with it, AIPerf takes the folder's path for a name on a hub
    streams = ("--streaming",)
    for kind, options in (("chat", streams), ("completions", streams), ("completions", ()), ("responses", streams)):
        with judge(f"{kind}{' in streams' if options else ''}: every request counted, none in error"):
            report = profile(args, kind, *options)
            assert report["request_count"]["avg"] == REQUESTS, report["request_count"]
            assert not report.get("error_summary"), report["error_summary"]
            if kind != "responses":  # of these it reads the usage only where nothing is cut off by its length
                assert report["output_sequence_length"]["avg"] == OUTPUT_TOKENS, report["output_sequence_length"]
            assert ("time_to_first_token" in report) == bool(options)
    with judge("the server is idle afterwards"):
        assert idle(args.demo, args.key)
    judge.end()


if __name__ == "__main__":
    main()
