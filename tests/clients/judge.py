"""What the script of every client shares: its arguments, and checks that are counted.

The standard library only: scripts run inside the environments of their clients. Each check is told on standard output
as one JSON object a line; ``run.py`` reads them, and passes over whatever else a client prints.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "demo" / "target"
MODEL = "demo"  # the name that both servers answer to
CONTEXT = 1024
PROMPT = "def fib(n):\n"
DETAIL_CHARS = 2000

# prompts that the scripted server does something about; see scripted_server.py
FAIL_MIDWAY = "fail midway"
BUSY_ONCE = "busy once"
THINK_LONG = "think long"


def arguments(description: str | None) -> argparse.Namespace:
    """Where the servers are (without /v1), the key that they ask for, a wrong one, and a folder to write to."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--demo", required=True, help="address of the demo model's server")
    parser.add_argument("--exact", required=True, help="address of the demo model's server in float32")
    parser.add_argument("--scripted", required=True, help="address of the server without a model")
    parser.add_argument("--key", required=True, help="the API key of all of them")
    parser.add_argument("--out", required=True, type=Path, help="folder for what the client writes")
    return parser.parse_args()


# Bounded on all sides: a model of 8 million parameters cannot be trusted to end a string.
PICK_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "final": {"type": "boolean"}},
    "required": ["colour", "final"],
    "additionalProperties": False,
}


class Judge:
    """Counts checks. ``with judge("name"):`` is passed when its body raises nothing."""

    def __init__(self) -> None:
        self.failed = 0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        detail = ""
        try:
            yield
        except (Exception, SystemExit):  # noqa: BLE001 - whatever goes wrong is the verdict
            detail = traceback.format_exc()[-DETAIL_CHARS:]
            self.failed += 1
        line = {"check": name, "passed": not detail, "seconds": round(time.monotonic() - started, 2), "detail": detail}
        print("\n" + json.dumps(line), flush=True)

    def end(self) -> None:
        """End the process: 1 if a check failed."""
        sys.stdout.flush()
        os._exit(min(self.failed, 1))  # not held up by threads that a client left behind


def raises(kind: type[BaseException] | tuple[type[BaseException], ...], act: Callable[[], object]) -> BaseException:
    """The error that ``act`` raises; it must be of that kind."""
    try:
        found = act()
    except kind as error:
        return error
    raise AssertionError(f"no error but {found!r}")


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition comes true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def metric(url: str, key: str, name: str) -> float:
    """The value of a metric without labels."""
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def idle(url: str, key: str) -> bool:
    """Whether the server comes to run nothing: what clients left behind has ended."""
    return eventually(lambda: metric(url, key, "saccade_running") == 0)


def command(*words: str, seconds: float = 300, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a client's command, which lies beside this environment's Python, in a folder."""
    found = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    done = subprocess.run(found, capture_output=True, text=True, timeout=seconds, cwd=folder, check=False)
    print(done.stdout[-20000:], done.stderr[-20000:], sep="\n", flush=True)
    return done


def succeeded(done: subprocess.CompletedProcess[str]) -> None:
    """Refuse a command that failed, with the end of what it said."""
    said = (done.stdout[-1000:] + "\n" + done.stderr[-1000:]).strip()
    assert done.returncode == 0, f"exit status {done.returncode}: {said}"


def json_lines(path: Path) -> Sequence[dict[str, object]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
