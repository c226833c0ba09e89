"""The official client against the demo model over HTTP: the script that `make clients` runs for its other versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.run import DEMO, SCRIPTED, Servers, read_checks
from tests.process.serving import ROOT, serving

pytestmark = pytest.mark.process

KEY = "sk-of-a-test"


def test_the_official_client_passes_all_its_checks(tmp_path: Path) -> None:
    keyed = {"SACCADE_API_KEY": KEY}
    with serving(*DEMO, "--plan", "fixed", **keyed) as demo, serving(program=SCRIPTED, **keyed) as scripted:
        servers = Servers(demo.url, demo.url, scripted.url, KEY)
        command = [sys.executable, "tests/clients/use_openai.py", *servers.arguments(), "--out", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    checks = read_checks(done.stdout)
    assert len(checks) >= 26, done.stderr
    assert not [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    assert done.returncode == 0
