"""GET /health and GET /metrics: for whoever runs the server."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from decoding.errors import EngineDeadError
from server.api import Api
from server.engine_client import check_ready
from server.errors import UnavailableError, reply_to

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operations_router(api: Api) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """200 when a request would be served now, else 503 with the reason."""
        state = api.client.state
        try:
            check_ready(state)
        except (UnavailableError, EngineDeadError) as error:
            reply = reply_to(error)
            return JSONResponse({"status": state, **reply.body()}, reply.status, headers=reply.headers)
        return JSONResponse({"status": state})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(api.metrics.render(), headers={"Content-Type": METRICS_TYPE})

    return router
