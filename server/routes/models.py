"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.api import Api


def models_router(api: Api) -> APIRouter:
    router = APIRouter()

    def model(name: str) -> dict[str, Any]:
        described = {"id": name, "object": "model", "created": api.created, "owned_by": "saccade"}
        # clients of vLLM read "root"; it says no more than the name, which need not be the folder's
        return {**described, "root": name, "max_model_len": api.client.info.max_model_len}

    @router.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [model(name) for name in api.settings.model_names]})

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        return JSONResponse(model(api.model_name(name)))

    return router
