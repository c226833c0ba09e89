"""What docker/ says, held against what the server is. `make rehearse-image` goes through the Dockerfile's steps."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.kernels.arch import ARCHS
from server.cli import DEFAULT_PORT, parse
from server.limits import Limits
from tests.image.dockerfile import DOCKERFILE, ROOT, Dockerfile, Instruction, ignored, read

DEVICES = ("cpu", "cuda")
COMPOSE = ROOT / "docker" / "compose.yaml"


def dockerfile(device: str = "cpu") -> Dockerfile:
    return read(DOCKERFILE.read_text(encoding="utf-8"), {"DEVICE": device})


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    """A compose file, with variables at their defaults."""
    text = (COMPOSE.parent / name).read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return content


@pytest.mark.parametrize("device", DEVICES)
def test_the_image_runs_as_a_user_without_rights(device: str) -> None:
    users = [step.text for stage in dockerfile(device).lineage("final") for step in stage.all("USER")]
    assert users
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[-1])


def test_compilers_stay_behind_but_for_the_one_that_triton_needs() -> None:
    packages = {
        device: {
            word
            for stage in dockerfile(device).lineage("final")
            for step in stage.all("RUN")
            for word in re.findall(r"install --no-install-recommends -y (.*?) &&", step.text)
        }
        for device in DEVICES
    }
    assert packages == {"cpu": set(), "cuda": {"gcc libc6-dev"}}


def test_every_package_is_copied_and_nothing_that_is_ignored() -> None:
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    copied = {
        word
        for stage in dockerfile().stages
        for step in stage.all("COPY")
        if not step.text.startswith("--from")
        for word in step.text.split()[:-1]
    }
    for name in copied:
        inside = [path for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
        for path in [ROOT / name] if (ROOT / name).is_file() else inside:
            assert not ignored(str(path.relative_to(ROOT)), patterns), path
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "constraints.txt", project["project"]["readme"]} <= copied


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("server/cli.py", True),
        ("models/kernels/vec.h", True),
        ("benchmarks/workloads/README.md", True),
        ("benchmarks/results/matrix.json", False),
        ("demo/target/model.safetensors", False),
        (".venv/bin/python", False),
        (".git/config", False),
        ("tests/unit/test_image.py", False),
        ("server/routes/__pycache__/chat.cpython-311.pyc", False),
        ("models/old.so", False),
    ],
)
def test_what_the_build_sees(path: str, kept: bool) -> None:
    assert ignored(path, (ROOT / ".dockerignore").read_text(encoding="utf-8")) is not kept


def test_the_kernels_are_for_known_cpus_best_first_and_the_image_knows_them() -> None:
    file = dockerfile()
    archs = [ARCHS[name] for name in file.arguments["KERNEL_ARCH"].split(",")]
    assert all(better.needs > worse.needs for better, worse in pairwise(archs))
    for name in ("build", "final"):
        environment = " ".join(step.text for step in file.stage(name).all("ENV"))
        assert "SACCADE_KERNEL_ARCH=${KERNEL_ARCH}" in environment
        assert "SACCADE_CACHE=/opt/saccade/cache" in environment
        assert any(step.text == "KERNEL_ARCH" for step in file.stage(name).all("ARG"))


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server whose /health has that status; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def health_check(port: int) -> int:
    final = dockerfile().stage("final")
    command = Instruction("CMD", final.all("HEALTHCHECK")[0].text.partition("CMD ")[2]).words()
    assert command[0] == "python"
    assert command[2].count(str(DEFAULT_PORT)) == 1
    code = command[2].replace(str(DEFAULT_PORT), str(port))
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, timeout=30).returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_health_is_what_the_server_says(status: int, code: int) -> None:
    with answering(status) as port:
        assert health_check(port) == code


def test_no_server_is_not_healthy() -> None:
    with answering(200) as port:
        pass
    assert health_check(port) == 1


def test_the_containers_command_line_is_one_that_the_server_takes() -> None:
    final = dockerfile().stage("final")
    assert [step.text for step in final.all("EXPOSE")] == [str(DEFAULT_PORT)]
    service = compose()["services"]["saccade"]
    args = parse([*final.all("ENTRYPOINT")[0].words()[1:], *service["command"].split()])
    assert (args.host, args.port, args.metrics_public) == ("0.0.0.0", DEFAULT_PORT, True)
    models, _, options = service["volumes"][0].rpartition(":")
    host, _, inside = models.partition(":")
    assert (inside, options) == ("/models", "ro")
    paths = [args.model, *(text.partition("=")[2] for text in args.speculate if "=" in text)]
    for path in paths:
        assert (COMPOSE.parent / host / Path(path).relative_to(inside) / "config.json").exists()
    assert float(service["stop_grace_period"].removesuffix("s")) > Limits().shutdown_timeout


def test_ports_are_published_on_the_loopback_interface_only() -> None:
    for service in compose()["services"].values():
        assert service["ports"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_files_that_containers_get_are_there() -> None:
    content = compose()
    for service in content["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            known = source in content["volumes"] if source[0] not in "./" else (COMPOSE.parent / source).exists()
            assert known, source


def test_prometheus_and_grafana_find_each_other() -> None:
    services = compose()["services"]
    scraped = compose("prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped == [f"saccade:{DEFAULT_PORT}"]
    source = compose("grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert "127.0.0.1:9090:9090" in services["prometheus"]["ports"]
    folder = compose("grafana/provisioning/dashboards/saccade.yml")["providers"][0]["options"]["path"]
    assert any(volume.split(":")[1] == folder for volume in services["grafana"]["volumes"])


def test_the_gpu_file_changes_services_that_there_are() -> None:
    cuda = compose("compose.cuda.yaml")["services"]
    assert set(cuda) <= set(compose()["services"])
    assert cuda["saccade"]["build"]["args"]["DEVICE"] == "cuda"
    assert dockerfile("cuda").stage("build").base == "torch-cuda"
