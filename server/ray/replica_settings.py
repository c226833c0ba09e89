"""What a replica serves: the ``args`` of the application in Ray Serve's config file."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decoding.config import EngineConfig
from decoding.errors import ConfigError, nearest
from server.cli import DEFAULT_HOST, parse, server_settings
from server.engine_driver import ENGINE
from server.flags import engine_config
from server.limits import Limits
from server.ray.affinity import MAX_IMBALANCE, MAX_KEYS
from server.serve_flags import limits, tls
from server.settings import ServerSettings

SPARE_REQUESTS = 64  # beyond what a replica lets in, so that it is the replica that refuses, with a 429
_PORTS = re.compile(r"(\d{1,5})-(\d{1,5})")
# what the proxy listens for, and its connections, are Ray's
_NOT_HERE = {
    "host": "http_options.host",
    "port": "http_options.port",
    "keep_alive_timeout": "http_options.keep_alive_timeout_s",
    "max_connections": "a load balancer before the proxies",
    "header_timeout": "a load balancer before the proxies",
}


@dataclass(frozen=True)
class ReplicaSettings:
    """Plain data, so that Ray can send it.

    Attributes:
        serve: flags of ``saccade serve``, its model first, as on a command line.
        max_imbalance, max_keys: of ``server.ray.affinity``.
        metrics_ports: such as "9400-9415": each replica of a machine takes one, for its own /metrics.
        metrics_host: on which they listen.
        engine: the class that the engine processes run, as "module:class".
    """

    serve: str
    max_imbalance: int = MAX_IMBALANCE
    max_keys: int = MAX_KEYS
    metrics_ports: str | None = None
    metrics_host: str = DEFAULT_HOST
    engine: str = ENGINE

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> ReplicaSettings:
        """The settings of an application's ``args``.

        Raises:
            ConfigError: an argument is missing, unknown or of another type, or the flags are no command line.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in args:
            if name not in names:
                raise ConfigError(f"args of the application have {name!r}: {nearest(name, names)}")
        if not isinstance(args.get("serve"), str):
            raise ConfigError("args of the application need serve: the flags of saccade serve, such as 'demo/target'")
        for name in ("max_imbalance", "max_keys"):
            if name in args and (type(args[name]) is not int or args[name] < 1):
                raise ConfigError(f"{name} in args of the application must be a whole number of at least 1")
        settings = cls(**args)
        settings.arguments()
        settings.ports()
        return settings

    def arguments(self) -> argparse.Namespace:
        """The flags, parsed.

        Raises:
            ConfigError: they are no command line of ``saccade serve``, or one that a replica cannot have.
        """
        try:
            args = parse(["serve", *shlex.split(self.serve)])
        except SystemExit:  # what is wrong is on standard error
            raise ConfigError(f"saccade serve does not take the flags {self.serve!r}") from None
        own = vars(parse(["serve", "none"]))
        for name, instead in _NOT_HERE.items():
            if getattr(args, name, None) != own.get(name):
                raise ConfigError(f"--{name.replace('_', '-')} does not work in a replica; use {instead}")
        if tls(args) is not None:
            raise ConfigError("--ssl-certfile does not work in a replica; end TLS before the proxies")
        if hasattr(args, "api_key"):
            raise ConfigError("--api-key would be for all to read; use the variable SACCADE_API_KEY or --api-key-file")
        return args

    def parsed(self) -> tuple[EngineConfig, ServerSettings, str | None]:
        """For the engine, for the application, and the chat template.

        Raises:
            ConfigError: a setting that cannot be.
        """
        args = self.arguments()
        config = engine_config(args)
        return config, server_settings(args, config), getattr(args, "chat_template", None)

    def limits(self) -> Limits:
        """The limits that each replica keeps."""
        return limits(self.arguments())

    def most_requests(self) -> int:
        """That Ray gives a replica at once: more than it lets in, since those that Ray holds back wait unseen."""
        config, kept = engine_config(self.arguments()), self.limits()
        own = kept.max_concurrent_requests or config.max_num_seqs + kept.max_queued_requests
        return own + SPARE_REQUESTS

    def ports(self) -> range:
        """For metrics, none if none are given.

        Raises:
            ConfigError: they are no range.
        """
        if self.metrics_ports is None:
            return range(0)
        found = _PORTS.fullmatch(self.metrics_ports)
        ports = range(int(found[1]), int(found[2]) + 1) if found else range(0)
        if not ports or ports[-1] > 65535:
            raise ConfigError(f"metrics_ports {self.metrics_ports!r} is no range of ports; write it as 9400-9415")
        return ports
