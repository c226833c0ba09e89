"""GET /health, /ready, /live and /metrics: for whoever runs the server."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from decoding.errors import EngineDeadError, SaccadeError
from server.admission import Guard
from server.api import Api
from server.engine_client import check_ready
from server.errors import UnavailableError, reply_to

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_GET_OR_HEAD = ["GET", "HEAD"]


def operations_router(api: Api, guard: Guard) -> APIRouter:
    router = APIRouter()

    def refused(error: SaccadeError) -> Response:
        reply = reply_to(error)
        return JSONResponse({"status": api.client.state, **reply.body()}, reply.status, headers=reply.headers)

    @router.api_route("/health", methods=_GET_OR_HEAD)
    async def health() -> Response:
        """200 when requests are served now, else 503 with the reason."""
        try:
            check_ready(api.client.state)
        except (UnavailableError, EngineDeadError) as error:
            return refused(error)
        return JSONResponse({"status": api.client.state})

    @router.api_route("/ready", methods=_GET_OR_HEAD)
    async def ready() -> Response:
        """200 when the next request would be taken, else 503: as /health, and the queue has room."""
        if api.client.state == "ready" and guard.full:
            return refused(UnavailableError("The server is overloaded: its queue is full."))
        return await health()

    @router.api_route("/live", methods=_GET_OR_HEAD)
    async def live() -> Response:
        """200 as long as waiting makes sense: 503 only when the engine was given up, and a restart is needed."""
        if api.client.state == "dead":
            return await health()
        return JSONResponse({"status": api.client.state})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(api.metrics.render(), headers={"Content-Type": METRICS_TYPE})

    return router
