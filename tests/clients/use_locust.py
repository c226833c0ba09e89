"""Locust: 16 users for 8 seconds, half of them in streams, with locustfile.py."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from judge import Judge, arguments, command, idle, succeeded

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def load(judge: Judge, args: Namespace, url: str, name: str) -> None:
    with judge(f"16 users, no failure, {name}"):
        stats = args.out / name
        done = command(
            *("locust", "--locustfile", str(LOCUSTFILE), "--headless", "--host", url, "--only-summary"),
            *("--users", "16", "--spawn-rate", "16", "--run-time", "8s", "--stop-timeout", "10"),
            *("--json-file", str(stats), "--exit-code-on-error", "1", "--api-key", args.key),
        )
        succeeded(done)
        entries = json.loads(stats.with_suffix(".json").read_text())
        assert {entry["name"] for entry in entries} == {"whole", "stream"}
        assert all(entry["num_requests"] > 10 and entry["num_failures"] == 0 for entry in entries)
        assert idle(url, args.key)


def main() -> None:
    args, judge = arguments(__doc__), Judge()
    load(judge, args, args.demo, "demo")
    load(judge, args, args.scripted, "scripted")
    judge.end()


if __name__ == "__main__":
    main()
