"""API keys: who may send a request at all."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.types import Scope

from decoding.errors import ConfigError, SaccadeError

# Everything else needs a key. What is here tells a load balancer whether to send requests, and nothing more.
OPEN_PATHS = frozenset({"/health", "/ready", "/live"})
METRICS_PATH = "/metrics"


class AuthenticationError(SaccadeError):
    """No key, or one that is not known. An HTTP 401; the key is never repeated, in an answer or a log."""


class ApiKeys:
    """The keys that are served. Only their digests are kept.

    Args:
        keys: none means that everybody is served.
        metrics_public: whether /metrics is open to everybody.
    """

    def __init__(self, keys: Iterable[str] = (), *, metrics_public: bool = False) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys))
        self._open = OPEN_PATHS | {METRICS_PATH} if metrics_public else OPEN_PATHS

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, scope: Scope) -> str:
        """Let a request pass.

        Returns:
            a name of the key that does not give it away; "" where none is needed.

        Raises:
            AuthenticationError: it has no key that is known.
        """
        # scope["path"] is what is routed; a URL put together with the Host header can be made to differ from it
        # (CVE-2026-48710)
        if not self._digests or scope["path"] in self._open:
            return ""
        given = hashlib.sha256(_bearer_token(scope)).digest()
        known = False
        for digest in self._digests:  # all of them, whichever fits: the time says nothing about the keys
            known |= hmac.compare_digest(given, digest)
        if not known:
            raise AuthenticationError(
                "Incorrect API key provided. Send a key of this server in the header Authorization: Bearer KEY."
            )
        return hashlib.sha256(b"saccade key name" + given).hexdigest()[:32]


def _bearer_token(scope: Scope) -> bytes:
    """The one token of the request; empty when there is none, or more than one."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return b""
    scheme, _, token = values[0].partition(b" ")
    return bytes(token.strip()) if scheme.lower() == b"bearer" else b""


def collect_keys(given: Iterable[str], file: str | None, environment: str | None) -> tuple[str, ...]:
    """The keys of --api-key, of --api-key-file (one a line) and of SACCADE_API_KEY (one, or several with commas).

    Raises:
        ConfigError: a file that cannot be read, or a key that no header can carry.
    """
    keys = [*given, *(_read_keys(file) if file is not None else ()), *(environment or "").split(",")]
    keys = [key.strip() for key in keys if key.strip()]
    if file is not None and not keys:
        raise ConfigError(f"--api-key-file {file} has no keys; write one a line")
    for number, key in enumerate(keys, 1):  # the number, not the key: this goes to a terminal or a log
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"API key {number} has characters that no header can carry; use letters and digits")
    return tuple(keys)


def _read_keys(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--api-key-file {file} cannot be read: {reason}") from error
    return [line for line in lines if not line.lstrip().startswith("#")]
