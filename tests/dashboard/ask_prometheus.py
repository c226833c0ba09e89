"""Asks a real Prometheus what the dashboard asks: ``make check-dashboard``, where there is a Prometheus.

It scrapes the demo server under a load of some seconds. Each query of each panel must be accepted and bring a number;
they are printed, for whoever wants to look whether they can be true. Grafana itself is not needed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load.cli import main as bench
from tests.process.serving import DEMO, ROOT, serving

DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "saccade.json"
SCRAPE_SECONDS = 1
WINDOW = "30s"  # of rates, in place of Grafana's $__rate_interval
READY_SECONDS = 30


def main() -> int:
    """
    Returns:
        0; 1 when a query failed or brought nothing; 2 without a Prometheus.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="prometheus", help="the program (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load (default: %(default)s)")
    args = parser.parse_args()
    program = shutil.which(args.prometheus)
    if program is None:
        print(f"there is no program {args.prometheus!r}; Debian and Ubuntu have it as the package prometheus")
        return 2
    with serving(*DEMO[:-2], "--kv-cache-memory", "8MiB") as server, watching(program, server.url) as url:
        load(server.url, args.seconds)
        time.sleep(2 * SCRAPE_SECONDS)
        failed = [title for title, query, legend in queries() if not told(url, title, query, legend)]
    print(
        f"\n{len(failed)} of {sum(1 for _ in queries())} queries brought nothing{': ' if failed else ''}{failed or ''}"
    )
    return 1 if failed else 0


@contextlib.contextmanager
def watching(program: str, server: str) -> Iterator[str]:
    """A Prometheus that scrapes the server; its address."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        scrape = {"job_name": "saccade", "static_configs": [{"targets": [server.removeprefix("http://")]}]}
        config = {"global": {"scrape_interval": f"{SCRAPE_SECONDS}s"}, "scrape_configs": [scrape]}
        path = Path(folder) / "prometheus.yml"
        path.write_text(json.dumps(config))  # JSON is YAML
        words = [f"--config.file={path}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
        process = subprocess.Popen([program, *words, "--log.level=error"])
        try:
            wait_ready(f"http://{address}/-/ready")
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait()


def wait_ready(url: str) -> None:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(f"{url} is not ready after {READY_SECONDS} s")


def load(url: str, seconds: float) -> None:
    """Requests that differ, more than there is room for in the K/V pool, and one that is refused."""
    words = ["--base-url", url, "--duration", str(seconds), "--no-progress", "--temperature", "0.7"]
    path = str(ROOT / "benchmarks" / "workloads" / "code-editing.jsonl")
    bench([*words, "--concurrency", "24", "--dataset-path", path])
    httpx.post(f"{url}/v1/completions", json={"prompt": 7})


def queries() -> Iterator[tuple[str, str, str]]:
    """Title, query and legend of each line of each panel."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", WINDOW).replace("$job", ".*").replace("$instance", ".*")
            yield f"{panel['title']} [{panel['fieldConfig']['defaults']['unit']}]", query, target["legendFormat"]


def told(url: str, title: str, query: str, legend: str) -> bool:
    """Whether the query brings a number."""
    answer: dict[str, Any] = httpx.get(f"{url}/api/v1/query", params={"query": query}).json()
    if answer["status"] != "success":
        print(f"{title}: {answer['error']}: {query}")
        return False
    lines = {named(legend, each["metric"]): float(each["value"][1]) for each in answer["data"]["result"]}
    print(f"{title}: " + ", ".join(f"{name} {value:.4g}" for name, value in sorted(lines.items())))
    return any(math.isfinite(value) for value in lines.values())


def named(legend: str, labels: dict[str, str]) -> str:
    """A legend with its labels filled in; those that are not there are empty."""
    for name, value in labels.items():
        legend = legend.replace("{{" + name + "}}", value)
    return re.sub(r"\{\{\w+\}\}", "", legend).strip()


if __name__ == "__main__":
    sys.exit(main())
