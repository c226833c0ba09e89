"""The HTTP application."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from decoding.errors import RequestError, SaccadeError, nearest
from decoding.text import Tokenizer
from server.account import Account
from server.admission import Admission, Guard
from server.api import Api
from server.auth import ApiKeys
from server.cors import OriginMiddleware
from server.engine_client import EngineClient
from server.errors import ErrorReply, reply_to
from server.grammar_worker import GrammarCheck, SizeCheck
from server.metrics import Metrics
from server.middleware import REQUEST_ID, AdmissionMiddleware, RequestMiddleware, assign_id
from server.request_log import log_request
from server.routes.chat import chat_router
from server.routes.completions import completions_router
from server.routes.document import document_router
from server.routes.models import models_router
from server.routes.operations import operations_router
from server.routes.responses import responses_router
from server.routes.tokenize import tokenize_router
from server.routes.version import version_router
from server.settings import ServerSettings
from server.tracing import RequestTracer

ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/version",
    "/health",
    "/ready",
    "/live",
    "/metrics",
    "/openapi.json",
)


def build_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    settings: ServerSettings,
    admission: Admission | None = None,
    grammars: GrammarCheck | None = None,
    tracer: RequestTracer | None = None,
) -> FastAPI:
    """The application that serves ``client``; starting and closing the client, and ``grammars``, is the caller's.

    Args:
        admission: in place of the one that ``settings`` describe.
        grammars: checks those of requests; default: by their size alone.
        tracer: makes a span of each request.
    """
    vllm = settings.observation.vllm_metrics
    metrics = Metrics(client, settings.model_names[0], vllm=vllm)
    api = Api(client, tokenizer, settings, metrics, grammars or SizeCheck())
    security = settings.security
    keys = ApiKeys(security.api_keys, metrics_public=security.metrics_public)
    guard = Guard(settings.limits, keys, settings.rows)
    # FastAPI would make another document: bodies are parsed by hand, for errors that OpenAI's clients understand
    app = FastAPI(title="Saccade", openapi_url=None, redirect_slashes=False)
    routers = (
        completions_router(api),
        chat_router(api),
        responses_router(api),
        models_router(api),
        operations_router(api, guard),
        tokenize_router(api),
        version_router(),
        document_router(),
    )
    for router in routers:
        app.include_router(router)
    app.add_middleware(AdmissionMiddleware, admission=admission or guard, body_seconds=settings.limits.body_timeout)
    if security.cors_origins:
        app.add_middleware(OriginMiddleware, **origin_options(security.cors_origins))
    watchers = [log_request] if tracer is None else [log_request, tracer.trace]
    app.add_middleware(RequestMiddleware, metrics=metrics, watchers=watchers, routes=ROUTES)
    app.add_exception_handler(SaccadeError, _on_own_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_mistake)
    app.state.refused = partial(_on_refused, metrics)
    return app


def _on_refused(metrics: Metrics, request_id: str, reply: ErrorReply) -> None:
    """A connection was refused before a request came to be: nothing else here hears of it."""
    account = Account(request_id, "other", "unknown", reply.status, 0.0, error=reply)
    metrics.count(account)
    log_request(account)


def origin_options(origins: tuple[str, ...]) -> dict[str, Any]:
    """Web pages of these origins may call the API. Keys go in a header, so cookies never are."""
    return {
        "allow_origins": origins,
        "allow_credentials": False,
        "allow_methods": ("GET", "POST"),
        "allow_headers": ("*",),
        "expose_headers": (REQUEST_ID, "retry-after", "retry-after-ms"),
    }


async def _on_own_error(request: Request, error: Exception) -> Response:
    return reply_to(error).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Routing errors: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:100]
    if error.status_code == 404:
        known = RequestError(f"There is nothing at {path!r}: {nearest(path, ROUTES)}.", code="not_found")
        return reply_to(known).response()
    headers = dict(error.headers or {})
    if error.status_code == 405:
        message = f"{path} does not answer {request.method[:20]}; use {headers.get('Allow', 'another method')}."
        return ErrorReply(405, "invalid_request_error", "method_not_allowed", message, headers=headers).response()
    reply = ErrorReply(error.status_code, "invalid_request_error", "invalid_value", str(error.detail)[:200])
    return reply.response()


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_mistake(request: Request, error: Exception) -> Response:
    """An error that nobody foresaw; the traceback goes to the log."""
    response = reply_to(error).response()
    response.headers[REQUEST_ID] = assign_id(request.scope)  # this handler is outside of the middleware
    return response
