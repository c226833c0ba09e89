"""Flags of ``saccade serve`` beside the engine's: limits, times, keys, TLS. Their defaults are those of the dataclasses
that they fill.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from decoding.errors import ConfigError
from server.auth import collect_keys
from server.flags import positive, size, whole
from server.limits import MIB, Limits
from server.security import Security, Tls

KEY_VARIABLE = "SACCADE_API_KEY"


def seconds(text: str) -> float:
    """A time that is not negative."""
    with contextlib.suppress(ValueError):
        if 0.0 <= float(text) < math.inf:  # false for nan
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")


def some_seconds(text: str) -> float:
    """A time above 0."""
    if (value := seconds(text)) > 0.0:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")


def _up_to(most: int) -> Callable[[str], int]:
    """A count that can be lowered, and not raised: the engine takes no more."""

    def count(text: str) -> int:
        if (value := whole(text)) <= most:
            return value
        raise argparse.ArgumentTypeError(f"{text!r} is more than {most}, which is the most there can be")

    return count


# field of Limits: type, placeholder, help
_LIMITS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "max_queued_requests": (whole, "N", "choices that may wait for a place in the batch; a request beyond gets a 429"),
    "max_concurrent_requests": (positive, "N", "HTTP requests answered at once (default: a batch and a queue full)"),
    "max_connections": (positive, "N", "open connections"),
    "request_timeout": (some_seconds, "SECONDS", "for a whole answer (default: no limit); requests can ask for less"),
    "max_body_size": (size, "SIZE", "of a request's body"),
    "max_body_values": (positive, "N", "strings, arrays and objects of a request's body"),
    "max_body_memory": (size, "SIZE", "of all bodies that are read, parsed and tokenized at once"),
    "max_header_size": (size, "SIZE", "of a request's line and headers"),
    "max_header_count": (positive, "N", "of a request's headers"),
    "max_prompt_chars": (positive, "N", "of a prompt (default: what the context can hold)"),
    "max_prompt_tokens": (positive, "N", "of a prompt (default: the context)"),
    "max_n": (_up_to(Limits.max_n), "N", "choices of a prompt"),
    "max_stop": (_up_to(Limits.max_stop), "N", "stop strings of a request"),
    "max_logprobs": (_up_to(Limits.max_logprobs), "N", "alternatives with a logprob"),
    "max_answer_tokens": (positive, "N", "of an answer that is not streamed, alternatives with a logprob included"),
    "max_pending_tokens": (positive, "N", "of one request that wait for a slow client before it is cut off"),
    "header_timeout": (some_seconds, "SECONDS", "in which a request's headers must arrive"),
    "body_timeout": (some_seconds, "SECONDS", "in which its body must arrive"),
    "write_timeout": (some_seconds, "SECONDS", "after which a client that reads nothing is cut off"),
    "keep_alive_timeout": (positive, "SECONDS", "for which an idle connection is kept"),
    "shutdown_timeout": (seconds, "SECONDS", "for requests in flight to end after SIGTERM or ctrl-C"),
    "watchdog_timeout": (some_seconds, "SECONDS", "after which an engine that does not finish a step is restarted"),
}


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """The fields of Limits."""
    group = parser.add_argument_group("limits")
    defaults = Limits()
    for name, (kind, placeholder, text) in _LIMITS.items():
        shown = text if "default:" in text else f"{text} (default: {_shown(getattr(defaults, name), kind)})"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=placeholder, help=shown)


def _shown(default: Any, kind: Callable[[str], Any]) -> str:
    if kind is not size:
        return f"{default:g}"
    return f"{default // MIB}MiB" if default >= MIB else f"{default // 1024}KiB"


def limits(args: argparse.Namespace) -> Limits:
    """The limits out of the flags that were given."""
    return Limits(**{name: value for name, value in vars(args).items() if name in _LIMITS})


def add_security_flags(parser: argparse.ArgumentParser) -> None:
    """Keys, origins, TLS."""
    add = parser.add_argument_group("security").add_argument
    add(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help=f"keys that clients must send; others on this machine can see them here, so better use {KEY_VARIABLE} or "
        "--api-key-file (default: no key is asked for)",
    )
    add("--api-key-file", metavar="FILE", help="keys, one a line")
    add("--isolate-keys", action="store_true", help="share cached prefixes only between requests of the same key")
    add("--metrics-public", action="store_true", help="/metrics needs no key")
    origins = "origins whose web pages may call the server, such as https://chat.example (default: none)"
    add("--cors-origins", nargs="+", metavar="ORIGIN", help=origins)
    add("--log-prompts", action="store_true", help="write the beginning of every prompt to the log")
    add("--ssl-certfile", metavar="FILE", help="serve HTTPS with this certificate (PEM)")
    add("--ssl-keyfile", metavar="FILE", help="its key, if it is in a file of its own")
    add("--ssl-ca-certs", metavar="FILE", help="clients must have a certificate that one of these signed")


def security(args: argparse.Namespace, key_in_environment: str | None) -> Security:
    """Who may use the server.

    Raises:
        ConfigError: keys that cannot be read or sent, or an origin that is none.
    """
    names = {field.name for field in dataclasses.fields(Security)}
    given = {name: value for name, value in vars(args).items() if name in names}
    origins = tuple(getattr(args, "cors_origins", ()))
    for origin in origins:
        _check_origin(origin)
    given["api_keys"] = collect_keys(
        getattr(args, "api_key", ()), getattr(args, "api_key_file", None), key_in_environment
    )
    given["cors_origins"] = origins
    return Security(**given)


def tls(args: argparse.Namespace) -> Tls | None:
    """The files for HTTPS, None for HTTP.

    Raises:
        ConfigError: a key or authorities without a certificate.
    """
    given = {name: getattr(args, f"ssl_{name}", None) for name in ("certfile", "keyfile", "ca_certs")}
    if given["certfile"] is None:
        if any(given.values()):
            raise ConfigError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile; give the server's certificate")
        return None
    return Tls(given["certfile"], given["keyfile"], given["ca_certs"])


def _check_origin(origin: str) -> None:
    scheme, mark, host = origin.partition("://")
    if origin != "*" and (scheme not in ("http", "https") or not mark or not host or "/" in host):
        raise ConfigError(f"--cors-origins {origin}: an origin is a scheme and a host, such as https://chat.example")
