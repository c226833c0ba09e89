"""The application of Ray Serve: ``import_path: server.ray.deployment:build`` in its config file."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from starlette.types import ASGIApp

from decoding.errors import ConfigError, EngineDeadError
from server.backend import Backend
from server.log import set_up_log
from server.model_folder import tokenizer_folder
from server.ray.operations import OperationsServer
from server.ray.proxy_middleware import HOOK, HOOK_VALUE
from server.ray.replica_app import ReplicaApp
from server.ray.replica_settings import ReplicaSettings
from server.serve import exempt_from_collection

ROUTER = "server.ray.request_router:PrefixRouter"
STATS_SECONDS = 1.0  # how old a router's knowledge of an engine's state may be
GRACE_SECONDS = 5.0  # that Ray gives a replica beyond its --shutdown-timeout before it kills it

log = logging.getLogger("saccade")


class Replica:
    """A supervised engine process and the application of ``saccade serve`` on it.

    Ray calls everything here on one event loop, whose thread lives as long as the replica's process. So that is where
    the engine process is started, which dies with the thread that started it.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        self._settings = settings
        self._name = serve.get_replica_context().replica_id.unique_id
        self._backend: Backend | None = None
        self._operations: OperationsServer | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray before it sends requests: the application, when the engine has loaded.

        Raises:
            ConfigError: the model cannot be loaded.
        """
        config, settings, chat_template = self._settings.parsed()
        logging.basicConfig(stream=sys.stderr)
        set_up_log(settings.observation.log_format, settings.observation.log_level)
        self._backend = Backend(config, settings, chat_template, self._settings.engine)
        engine = self._backend.engine
        application = await self._backend.application(tokenizer_folder(config))
        app = ReplicaApp(application, self._name, lambda: engine.state == "ready")
        await engine.start()
        if ports := self._settings.ports():
            self._operations = OperationsServer(
                app, application.state.refused, settings.limits, self._settings.metrics_host, ports
            )
            log.info("metrics   http://%s:%d/metrics", self._settings.metrics_host, self._operations.port)
        exempt_from_collection()
        log.info("ready     replica %s", self._name)
        return app

    async def check_health(self) -> None:
        """Called by Ray: an engine that restarts is its supervisor's business, one that was given up is Ray's.

        Raises:
            EngineDeadError: the replica must be replaced.
        """
        if self._backend is not None and self._backend.engine.state == "dead":
            raise EngineDeadError("the engine was given up")

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray; the request router reads it."""
        if self._backend is None:
            return {"ready": False}
        return {"ready": self._backend.engine.state == "ready", "requests": self._backend.engine.in_flight}

    async def __del__(self) -> None:
        """Called by Ray when the last request has been answered: drafters write what they keep."""
        if self._operations is not None:
            await self._operations.close()
        if self._backend is not None:
            await self._backend.close()


def build(args: dict[str, Any]) -> Application:
    """Called by Ray with the application's ``args``; see ``ReplicaSettings``.

    Raises:
        ConfigError: they are wrong, or the proxies would not know the replicas.
    """
    settings = ReplicaSettings.of(args)
    if os.environ.get(HOOK) != HOOK_VALUE:
        raise ConfigError(
            f"the HTTP proxies know nothing of prefixes: set {HOOK}={HOOK_VALUE} in the environment of every node "
            "before Ray is started, or use `saccade ray`, which does"
        )
    router = RequestRouterConfig(
        request_router_class=ROUTER,
        request_router_kwargs={"max_imbalance": settings.max_imbalance, "max_keys": settings.max_keys},
        request_routing_stats_period_s=STATS_SECONDS,
    )
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name="replica",
        request_router_config=router,
        max_ongoing_requests=settings.most_requests(),
        max_queued_requests=settings.most_requests(),
        graceful_shutdown_timeout_s=settings.limits().shutdown_timeout + GRACE_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
    )
    application: Application = deployment.bind(settings)
    return application
