"""``saccade ray``: Ray on this machine, and on it the replicas of a config file of Ray Serve."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from decoding.command_line import StrictParser
from decoding.errors import ConfigError
from server.log import own_process_log
from server.ray.proxy_middleware import FLAGS, HOOK, HOOK_VALUE
from server.ray.replica_settings import ReplicaSettings

APPLICATION = "server.ray.deployment:build"
HOST, PORT = "127.0.0.1", 8000  # Ray's defaults
WATCH_SECONDS = 1.0
MESSAGE_CHARS = 2000  # of why a replica could not be started

log = logging.getLogger("saccade")


def main(argv: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: Ray is not installed, or the config file is no such one.
    """
    args = _parser().parse_args(argv)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed; run: pip install 'saccade[ray]'")
    content = read_config(args.config)
    application = application_of(content)
    settings = ReplicaSettings.of(application.get("args") or {})
    set_environment(os.environ, settings, own=args.address is None)
    own_process_log("text", "info")
    http = content.get("http_options") or {}
    _run(args, str(application.get("name", "default")), f"http://{http.get('host', HOST)}:{http.get('port', PORT)}")
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


def read_config(config: str) -> dict[str, Any]:
    """A config file of Ray Serve.

    Raises:
        ConfigError: there is no such file, or it is none.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no YAML"
        raise ConfigError(f"{config} cannot be read: {reason}; give a config file of Ray Serve") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{config} is no config file of Ray Serve; docker/ray/serve.yaml is an example")
    return content


def application_of(content: dict[str, Any]) -> dict[str, Any]:
    """The application of ours in a config file.

    Raises:
        ConfigError: there is none, or more than one.
    """
    ours: list[dict[str, Any]] = [
        each
        for each in content.get("applications") or ()
        if isinstance(each, dict) and each.get("import_path") == APPLICATION
    ]
    if len(ours) != 1:
        raise ConfigError(f"the config file must have one application with import_path: {APPLICATION}, not {len(ours)}")
    return ours[0]


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


def _run(args: argparse.Namespace, name: str, address: str) -> None:
    import ray
    from ray import serve
    from ray.serve.scripts import run

    own = args.address is None
    local = {"include_dashboard": False, "_temp_dir": args.temp_dir} if own else {}
    ray.init(address=args.address or "local", namespace="serve", **local)
    signal.signal(signal.SIGTERM, _interrupt)  # not before: Ray sets a handler of its own
    try:
        with contextlib.suppress(KeyboardInterrupt):
            run.main([args.config, "--non-blocking"], standalone_mode=False)
            _watch(name, address)
        # the replicas first: with all of Serve the proxies would go at once, and streams with them
        serve.delete(name)
        if own:
            serve.shutdown()
    finally:
        ray.shutdown()


def _watch(name: str, address: str) -> NoReturn:
    """Say when requests can come; returns by KeyboardInterrupt only.

    Raises:
        ConfigError: no replica can be started.
    """
    from ray import serve

    ready = False
    while True:
        application = serve.status().applications.get(name)
        state = None if application is None else str(application.status.value)
        if application is not None and state == "DEPLOY_FAILED":
            told = [application.message, *(each.message for each in application.deployments.values())]
            raise ConfigError(f"the replicas cannot be started: {reason(told)}")
        if state == "RUNNING" and not ready:
            ready = True
            log.info("ready     %s/v1", address)
        time.sleep(WATCH_SECONDS)


def reason(messages: Sequence[str]) -> str:
    """What Ray says of a failure without the tracebacks, where the error is one of ours."""
    told = "\n".join(messages).strip()
    ours = re.findall(r"^decoding\.errors\.\w+: (.+)$", told, re.MULTILINE)
    return str(ours[-1]) if ours else told[-MESSAGE_CHARS:]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
