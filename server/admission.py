"""Who may send a request and whether there is room for it: asked once for each request, before it costs anything."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from starlette.types import Scope


class Admission(Protocol):
    """Decides over requests. What it returns is held until the answer has been sent."""

    def admit(self, scope: Scope) -> AbstractContextManager[None]:
        """Let a request in.

        Raises:
            SaccadeError: it may not come in; ``server.errors.reply_to`` must know how to say so.
        """
        ...


class AdmitAll:
    """No keys and no limits."""

    def admit(self, scope: Scope) -> AbstractContextManager[None]:
        return nullcontext()
