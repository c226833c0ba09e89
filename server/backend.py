"""An engine and the application that serves it: what ``saccade serve`` listens for, and what each Ray replica is."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import FastAPI

from decoding.config import EngineConfig
from decoding.text import Tokenizer
from server.app import build_app
from server.engine_driver import ENGINE
from server.grammar_worker import GrammarWorker
from server.settings import ServerSettings
from server.socket_client import SocketEngineClient
from server.supervisor import Supervisor
from server.tracing import open_tracer


class Backend:
    """Its engine is started by whoever made it.

    Args:
        engine: the class that the engine process runs, as "module:class".
    """

    def __init__(
        self, config: EngineConfig, settings: ServerSettings, chat_template: str | None, engine: str = ENGINE
    ) -> None:
        self._settings = settings
        self._chat_template = chat_template
        told = settings.observation
        self.engine = Supervisor(
            lambda: SocketEngineClient(config, engine=engine, limits=settings.limits, observation=told)
        )
        self._grammars: GrammarWorker | None = None
        endpoint = told.otlp_traces_endpoint
        self._tracer = None if endpoint is None else open_tracer(endpoint)

    async def application(self, folder: Path) -> FastAPI:
        """The application; it can answer while the engine loads, /health with 503.

        Args:
            folder: of the tokenizer.
        """
        tokenizer = await asyncio.to_thread(Tokenizer.load, folder, chat_template=self._chat_template)
        form = self._settings.observation.log_format
        self._grammars = GrammarWorker(folder, lambda: self.engine.info.vocab_size, log_format=form)
        return build_app(self.engine, tokenizer, self._settings, grammars=self._grammars, tracer=self._tracer)

    async def close(self) -> None:
        """End the engine, and what the application uses."""
        await self.engine.close()
        if self._grammars is not None:
            await self._grammars.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
