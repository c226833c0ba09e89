"""Runs unmodified clients of OpenAI's API against this server: ``make clients``.

    python -m tests.clients.run [NAME ...]

Three servers are started on free ports of the loopback interface: the demo model with the drafters of the README, the
same in float32, and the HTTP application on a scripted engine, for what a healthy engine does not do. Every client gets
an environment of its own (versions.toml), and its script prints its checks. The exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.clients.environments import Client, SetupError, load_clients, prepare
from tests.clients.judge import MODEL, ROOT
from tests.process.serving import serving

BUILD = ROOT / "build" / "clients"
DRAFTERS = ("--speculate", "draft=demo/draft", "--speculate", "ngram", "--speculate", "prediction")
DEMO = ("demo/target", *DRAFTERS, "--served-model-name", MODEL, "--kv-cache-memory", "256MiB")
SCRIPTED = (sys.executable, "-m", "tests.clients.scripted_server")
# nothing asks the outside: hubs, price lists, usage statistics
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "DO_NOT_TRACK": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "LANGSMITH_TRACING": "false",
}


@dataclass(frozen=True)
class Check:
    """One line of a client's script."""

    name: str
    passed: bool
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a client."""

    client: Client
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """A client that checked nothing has not passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Servers:
    """The servers' addresses, and their API key."""

    demo: str
    exact: str
    scripted: str
    key: str

    def arguments(self) -> list[str]:
        addresses = ["--demo", self.demo, "--exact", self.exact, "--scripted", self.scripted]
        return [*addresses, "--key", self.key]


def read_checks(output: str) -> list[Check]:
    """The checks in a script's output; clients print other things as well."""
    checks = []
    for line in output.splitlines():
        if line.startswith('{"check": '):
            with contextlib.suppress(json.JSONDecodeError):
                found = json.loads(line)
                checks.append(Check(found["check"], found["passed"], found["seconds"], found["detail"]))
    return checks


def judge(client: Client, servers: Servers, build: Path) -> Outcome:
    """Set the client up and run its script."""
    began = time.monotonic()
    try:
        prepare(client, build / client.name)
        checks = run_script(client, servers, build)
    except SetupError as error:
        checks = [Check("set up", False, detail=str(error))]
    return Outcome(client, tuple(checks), time.monotonic() - began)


def run_script(client: Client, servers: Servers, build: Path) -> list[Check]:
    """The checks of a client's script, and one more if it did not come to its end."""
    folder, out = build / client.name, build / "out" / client.name
    out.mkdir(parents=True, exist_ok=True)
    log = build / "out" / f"{client.name}.log"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {**QUIET, "HF_HOME": str(out / "hub"), "CLIENT_ENVIRONMENT": str(folder)}
    command = [*client.command(folder), *servers.arguments(), "--out", str(out)]
    with log.open("w", encoding="utf-8") as written:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=written, stderr=written, timeout=client.seconds, check=False
            ).returncode
            ended = f"exit status {status}"
        except subprocess.TimeoutExpired:
            status, ended = -1, f"not at its end after {client.seconds:.0f} s"
    said = log.read_text(encoding="utf-8", errors="replace")
    checks = read_checks(said)
    if not checks or (status != 0 and all(check.passed for check in checks)):
        checks.append(Check("to the end", False, detail=f"{ended}; see {log}\n{said[-1500:]}"))
    return checks


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each client, under a heading."""
    rows = [("client", "version", "what it is", "checks", "seconds", "")]
    for each in outcomes:
        good = sum(check.passed for check in each.checks)
        verdict = "pass" if each.passed else "FAIL"
        counted = f"{good}/{len(each.checks)}"
        rows.append((each.client.name, each.client.version, each.client.what, counted, f"{each.seconds:.0f}", verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def chosen(names: Sequence[str]) -> list[Client]:
    """The clients of these names; without names all but those that run on request.

    Raises:
        ValueError: there is no such client.
    """
    clients = load_clients()
    unknown = set(names) - {client.name for client in clients}
    if unknown:
        known = ", ".join(client.name for client in clients)
        raise ValueError(f"no client is called {', '.join(sorted(unknown))}; there are: {known}")
    return [each for each in clients if each.name in names or not (names or each.on_request)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the clients; 0 if all checks passed."""
    parser = argparse.ArgumentParser(description="Run unmodified clients of OpenAI's API against this server.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="clients of versions.toml (default: all but the largest)"
    )
    try:
        clients = chosen(parser.parse_args(argv).names)
    except ValueError as error:
        parser.error(str(error))
    outcomes = []
    with contextlib.ExitStack() as stack:
        key = f"sk-{secrets.token_hex(16)}"
        demo = stack.enter_context(serving(*DEMO, SACCADE_API_KEY=key)).url
        exact = stack.enter_context(serving(*DEMO, "--dtype", "float32", SACCADE_API_KEY=key)).url
        scripted = stack.enter_context(serving(program=SCRIPTED, SACCADE_API_KEY=key)).url
        servers = Servers(demo, exact, scripted, key)
        for client in clients:
            outcome = judge(client, servers, BUILD)
            outcomes.append(outcome)
            print(f"{client.name} {client.version}", flush=True)
            for check in outcome.checks:
                print(f"  {'ok  ' if check.passed else 'FAIL'} {check.name}", flush=True)
                if not check.passed:
                    print("       " + check.detail.replace("\n", "\n       "), flush=True)
    print("\n" + table(outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
