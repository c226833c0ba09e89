"""``saccade ray``: Ray on this machine, and on it the replicas of a config file of Ray Serve."""

from __future__ import annotations

import argparse
import importlib.util
import os
import secrets
import signal
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from decoding.command_line import StrictParser
from decoding.errors import ConfigError
from server.ray.proxy_middleware import FLAGS, HOOK, HOOK_VALUE
from server.ray.replica_settings import ReplicaSettings

APPLICATION = "server.ray.deployment:build"


def main(argv: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: Ray is not installed, or the config file is no such one.
    """
    args = _parser().parse_args(argv)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed; run: pip install 'saccade[ray]'")
    set_environment(os.environ, replicas_of(args.config), own=args.address is None)
    _run(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = StrictParser(
        prog="saccade ray",
        description="Serve replicas of a model behind one address, with Ray Serve. Prefixes that repeat go where they "
        "are cached. See docs/ray-serve.md.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a config file of Ray Serve, such as docker/ray/serve.yaml")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster (default: one is started here)")
    parser.add_argument("--temp-dir", metavar="FOLDER", help="where Ray keeps sockets and logs (default: /tmp/ray)")
    return parser


def replicas_of(config: str) -> ReplicaSettings:
    """What a config file's application serves.

    Raises:
        ConfigError: there is no such file, or it has no application of ours.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no YAML"
        raise ConfigError(f"{config} cannot be read: {reason}; give a config file of Ray Serve") from error
    applications = content.get("applications") if isinstance(content, dict) else None
    ours = [each for each in applications or () if isinstance(each, dict) and each.get("import_path") == APPLICATION]
    if len(ours) != 1:
        raise ConfigError(f"{config} must have one application with import_path: {APPLICATION}; it has {len(ours)}")
    arguments: dict[str, Any] = ours[0].get("args") or {}
    return ReplicaSettings.of(arguments)


def set_environment(environment: MutableMapping[str, str], settings: ReplicaSettings, *, own: bool) -> None:
    """What Ray's processes must find in their environment, which they have of the one that starts Ray.

    Args:
        own: Ray is started here. A cluster that runs has its environment already.
    """
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    if not own:
        return
    environment[HOOK] = HOOK_VALUE
    environment[FLAGS] = settings.serve
    # Ray's own ports take commands from whoever reaches them (CVE-2023-48022): from now on, who has this token
    if environment.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in environment:
        environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _run(args: argparse.Namespace) -> None:
    import ray
    from ray.serve.scripts import run

    own = {} if args.address is not None else {"include_dashboard": False, "_temp_dir": args.temp_dir}
    ray.init(address=args.address or "local", namespace="serve", **own)
    signal.signal(signal.SIGTERM, _interrupt)  # not before: Ray sets a handler of its own
    try:
        run.main([args.config], standalone_mode=False)  # until ctrl-C: it drains the replicas then
    finally:
        ray.shutdown()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
