"""Who may use the server, and how it is reached."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from decoding.errors import ConfigError


@dataclass(frozen=True)
class Security:
    """Keys, origins and what is logged."""

    api_keys: tuple[str, ...] = ()  # none: everybody is served
    metrics_public: bool = False
    cors_origins: tuple[str, ...] = ()  # whose web pages may call the server from a browser; none by default
    isolate_keys: bool = False  # requests share cached prefixes only with those of the same key
    log_prompts: bool = False

    def __repr__(self) -> str:
        """Without the keys: a dataclass's own would print them wherever settings are printed."""
        return f"Security({len(self.api_keys)} keys, cors_origins={self.cors_origins})"


@dataclass(frozen=True)
class Tls:
    """Files for HTTPS. With ``ca_certs`` clients must have a certificate that one of those signed."""

    certfile: str
    keyfile: str | None = None
    ca_certs: str | None = None

    def context(self) -> ssl.SSLContext:
        """The server's side of TLS 1.2 and newer.

        Raises:
            ConfigError: a file is missing, or they do not belong together.
        """
        for flag, file in (("certfile", self.certfile), ("keyfile", self.keyfile), ("ca-certs", self.ca_certs)):
            if file is not None and not Path(file).is_file():
                raise ConfigError(f"there is no file {file!r}, which --ssl-{flag} names")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # a password would be asked for on the terminal, where nobody may sit
            context.load_cert_chain(self.certfile, self.keyfile, password=_no_password)
            if self.ca_certs is not None:
                context.load_verify_locations(self.ca_certs)
                context.verify_mode = ssl.CERT_REQUIRED
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "reason", None) or error.strerror or "no PEM certificate"
            raise ConfigError(
                f"TLS cannot be set up from {self.certfile} and {self.keyfile or 'the key in it'}: {reason}; give PEM "
                "files of a certificate and its key without a password"
            ) from error
        return context


def _no_password() -> str:
    return ""
