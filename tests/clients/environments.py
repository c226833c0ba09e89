"""The clients' own environments: what versions.toml pins, installed by pip or npm under build/clients."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
VERSIONS = HERE / "versions.toml"
RUN_SECONDS = 600.0


class SetupError(Exception):
    """An environment that could not be made."""


@dataclass(frozen=True)
class Client:
    """One client, as versions.toml describes it."""

    name: str
    what: str
    packages: tuple[str, ...]  # the client first; pip's or npm's requirements
    script: str
    seconds: float = RUN_SECONDS  # that its script may take
    bare: bool = False  # the client itself is installed without what it requires
    on_request: bool = False  # runs only when it is named

    @property
    def version(self) -> str:
        return self.packages[0].replace("==", "@").rpartition("@")[2]

    @property
    def node(self) -> bool:
        return self.script.endswith(".mjs")

    def command(self, folder: Path) -> list[str]:
        """What runs its script, in the environment at ``folder``."""
        runner = ["node"] if self.node else [str(folder / "bin" / "python")]
        return [*runner, str(HERE / self.script)]


def load_clients(path: Path = VERSIONS) -> list[Client]:
    """The clients of versions.toml, in its order.

    Raises:
        ValueError: an entry lacks a field, has an unknown one, or a requirement that pins no version.
    """
    clients = []
    for name, fields in tomllib.loads(path.read_text(encoding="utf-8")).items():
        try:
            client = Client(name=name, **{**fields, "packages": tuple(fields["packages"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path.name}, [{name}]: {error}") from error
        separator = "@" if client.node else "=="
        unpinned = [each for each in client.packages if separator not in each]
        if unpinned:
            raise ValueError(f"{path.name}, [{name}]: {', '.join(unpinned)} pins no version")
        clients.append(client)
    return clients


def prepare(client: Client, folder: Path) -> None:
    """Make the client's environment, unless it is there with these very packages.

    Raises:
        SetupError: with the end of what pip or npm said.
    """
    stamp = folder / "packages.json"
    if stamp.exists() and json.loads(stamp.read_text()) == list(client.packages):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for command in _commands(client, folder):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise SetupError(f"{command[0]} is not installed here") from error
        if done.returncode != 0:
            raise SetupError((done.stderr or done.stdout).strip()[-2000:])
    stamp.write_text(json.dumps(client.packages))


def _commands(client: Client, folder: Path) -> Sequence[list[str]]:
    if client.node:
        return [["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", *client.packages]]
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary"]
    alone = [[*install, "--no-deps", client.packages[0]]] if client.bare else []
    rest = client.packages[1:] if client.bare else client.packages
    return [[sys.executable, "-m", "venv", str(folder)], *alone, [*install, *rest]]
