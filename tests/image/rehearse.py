"""Builds and runs the image without Docker: the Dockerfile's steps, in their order, under a folder for a root.

    python -m tests.image.rehearse [--build-arg NAME=VALUE ...] [--kernels FOLDER]

What would change the machine (packages, users) is left out and named. What is run is run as this user, with this
machine's Python and, in the build stage, its compiler; the last stage finds nothing of the machine but Python.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.image.dockerfile import DOCKERFILE, ROOT, Dockerfile, Instruction, Stage, expand, ignored, read

FOLDERS = ("/opt/saccade", "/src", "/var/cache/saccade")  # of the image, which lie under the folder here
MACHINE = ("apt-get", "groupadd")  # what is left out
START_SECONDS = 180
BUILD_SECONDS = 3600


class Rehearsal:
    """The stages under ``folder``; ``folder``/root is what the present one has, the others lie beside it."""

    def __init__(self, file: Dockerfile, arguments: dict[str, str], folder: Path, kernels: Path | None) -> None:
        self._file = file
        self._arguments = arguments
        self._folder = folder
        self._kernels = kernels
        self.root = folder / "root"
        self._tools = folder / "bin"
        self._tools.mkdir()
        (self._tools / "python").symlink_to(Path(sys.base_prefix) / "bin" / "python3")

    def run(self, name: str, path: str) -> dict[str, str]:
        """Go through the stage and those that it is made of.

        Args:
            path: where programs of this machine are found.

        Returns:
            The environment of a container.
        """
        self.root.mkdir()
        environment = {"PATH": f"{self._tools}:{path}", "HOME": str(self._folder)}
        workdir = self.root
        for stage in self._file.lineage(name):
            known: dict[str, str] = {}
            for step in stage.instructions:
                text = self.here(expand(step.text, environment | known)) if step.verb != "RUN" else step.text
                if step.verb == "ARG":
                    known |= self._argument(step)
                elif step.verb == "ENV":
                    environment |= dict(word.split("=", 1) for word in Instruction("ENV", text).words())
                elif step.verb == "WORKDIR":
                    workdir = Path(text)
                    workdir.mkdir(parents=True, exist_ok=True)
                elif step.verb == "COPY":
                    self._copy(text.split(), workdir)
                elif step.verb == "RUN":
                    self._shell(text, environment | known, workdir)
                else:
                    print(f"{stage.name}: at a container's start: {step.verb} {text}")
        return environment

    def keep(self, name: str) -> None:
        """Put the present stage aside, for COPY --from."""
        self.root.rename(self._folder / name)

    def here(self, text: str) -> str:
        """Paths of the image as paths under the folder."""
        return re.sub(rf"(?<![\w/.])({'|'.join(FOLDERS)})\b", rf"{self.root}\1", text)

    def _argument(self, step: Instruction) -> dict[str, str]:
        name, _, default = step.text.partition("=")
        return {name: self._arguments.get(name, default or self._file.arguments.get(name, ""))}

    def _copy(self, words: list[str], workdir: Path) -> None:
        if words[0].startswith("--from="):
            other = self._folder / words[0].removeprefix("--from=")
            source = Path(str(other) + words[1].removeprefix(str(self.root)))
            shutil.copytree(source, words[2], symlinks=True, copy_function=os.link)
            return
        patterns = (ROOT / ".dockerignore").read_text()
        for word in words[:-1]:
            source = ROOT / word
            for path in [source] if source.is_file() else sorted(source.rglob("*")):
                if path.is_file() and not ignored(str(path.relative_to(ROOT)), patterns):
                    to = workdir / words[-1] / path.relative_to(source if source.is_dir() else source.parent)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, to)

    def _shell(self, text: str, environment: dict[str, str], workdir: Path) -> None:
        command = re.sub(r"^(--mount=\S+\s+)+", "", text)
        if any(word in command for word in MACHINE):
            print(f"not run: {command}")
            (self.root / "var/cache/saccade").mkdir(parents=True, exist_ok=True)
            return
        if "models.kernels.build" in command and self._kernels is not None:
            shutil.copytree(self._kernels, self.root / "opt/saccade/cache/kernels")
        print(f"run: {command}", flush=True)
        settings = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        command = self.here(command)
        subprocess.run(
            ["/bin/sh", "-c", command], cwd=workdir, env=settings | environment, check=True, timeout=BUILD_SECONDS
        )


def serve(final: Stage, rehearsal: Rehearsal, environment: dict[str, str]) -> None:
    """A container's life: start, health, a request, SIGTERM."""
    port = _free_port()
    entry = final.all("ENTRYPOINT")[0].words()
    check = Instruction("CMD", final.all("HEALTHCHECK")[0].text.partition("CMD ")[2].replace("8000", str(port))).words()
    python = [shutil.which(check[0], path=environment["PATH"]) or check[0], *check[1:]]
    program = shutil.which(entry[0], path=environment["PATH"]) or entry[0]
    image = rehearsal.root / "opt"
    before = _files(image)
    command = [program, *entry[1:], "--host", "127.0.0.1", "--port", str(port), str(ROOT / "demo/target")]
    command += ["--speculate", f"draft={ROOT / 'demo/draft'}", "--speculate", "ngram", "--kv-cache-memory", "256MiB"]
    log = rehearsal.root.parent / "log"
    workdir = rehearsal.root / "var/cache/saccade"
    with open(log, "w") as out:
        server = subprocess.Popen(command, cwd=workdir, env=environment, stdout=out, stderr=out)
    try:
        assert subprocess.run(python, env=environment, stderr=subprocess.DEVNULL).returncode == 1, "healthy too early"
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(python, env=environment, stderr=subprocess.DEVNULL).returncode != 0:
            assert server.poll() is None, f"the server has ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"not healthy after {START_SECONDS} s: {log.read_text()}"
            time.sleep(1)
        print("healthy; it says:", _complete(port))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, "a status other than 0 after SIGTERM"
    finally:
        server.kill()
        server.wait()
    print(log.read_text())
    assert "the CPU kernels are not available" not in log.read_text()
    assert _files(image) == before, f"written into the image: {_files(image) ^ before}"
    costs = list(workdir.glob("*.json"))
    assert costs, "no costs were kept where the volume is"
    print("written where the volume is:", *(path.name for path in costs))


def _complete(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"model": str(ROOT / "demo/target"), "prompt": "def fib(n):\n", "max_tokens": 16, "seed": 7})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    return repr(json.load(answer)["choices"][0]["text"])


def _files(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    """Rehearse; any step that fails ends it."""
    parser = argparse.ArgumentParser(description="Builds and runs the image without Docker, under a folder.")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build has it")
    parser.add_argument("--kernels", type=Path, metavar="FOLDER", help="libraries that were built before")
    options = parser.parse_args()
    arguments = dict(text.split("=", 1) for text in options.build_arg)
    file = read(DOCKERFILE.read_text(), arguments)
    with tempfile.TemporaryDirectory(prefix="image-") as folder:
        rehearsal = Rehearsal(file, arguments, Path(folder).resolve(), options.kernels)
        rehearsal.run("build", os.environ["PATH"])
        rehearsal.keep("build")
        serve(file.stage("final"), rehearsal, rehearsal.run("final", "/nonexistent"))
    print("the image works")


if __name__ == "__main__":
    main()
