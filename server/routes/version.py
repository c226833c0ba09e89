"""GET /version."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.openai.fingerprint import server_version


def version_router() -> APIRouter:
    router = APIRouter()

    @router.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": server_version()})

    return router
