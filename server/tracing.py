"""Spans of OpenTelemetry: one a request, made when it has been answered, so that a stream costs nothing meanwhile.

Names are those of the semantic conventions for HTTP and generative AI; what these have no name for is called as vLLM
calls it, or "saccade.…". No prompt and no output is told.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.types import Scope

from decoding.errors import ConfigError
from server.account import Account, Generated

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

EXPORT_SECONDS = 2  # for a batch of spans; a collector that is not there costs so long when the server ends
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat", "/v1/responses": "chat"}
_TRACE_HEADERS = (b"traceparent", b"tracestate")


class RequestTracer:
    """Makes the spans.

    Args:
        processor: takes them.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ours = Resource({"service.name": "saccade", "service.version": version("saccade")})
        # what the environment says (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) comes first
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("saccade", version("saccade"))
        self._propagator = TraceContextTextMapPropagator()

    def trace(self, account: Account, scope: Scope) -> None:
        """The span of a request; a child of the client's own, if it sent a ``traceparent``."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        ended = time.time_ns()
        began = ended - int(1e9 * account.seconds)
        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _TRACE_HEADERS}
        span = self._tracer.start_span(
            _name(account),
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes(account),
            start_time=began,
        )
        if _error(account) is not None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def open_tracer(endpoint: str) -> RequestTracer:
    """A tracer that sends spans to a collector, from a thread of its own.

    Raises:
        ConfigError: it is no URL, or the packages are not there.
    """
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ConfigError(
            f"--otlp-traces-endpoint {endpoint}: give the URL of a collector that takes OTLP over HTTP, such as "
            "http://127.0.0.1:4318/v1/traces"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("--otlp-traces-endpoint needs packages that are not there: install saccade[otel]") from error
    full = url._replace(path="/v1/traces").geturl() if url.path in ("", "/") else endpoint
    return RequestTracer(BatchSpanProcessor(OTLPSpanExporter(full, timeout=EXPORT_SECONDS)))


def attributes(account: Account) -> dict[str, Any]:
    """What a span tells."""
    found: dict[str, Any] = {
        "http.request.method": account.method,
        "http.route": account.route,
        "http.response.status_code": account.status,
        "saccade.request_id": account.request_id,
    }
    if account.generated is not None:
        found |= _generated(account.route, account.generated)
    if (error := _error(account)) is not None:
        found["error.type"] = error
    return {name: value for name, value in found.items() if value is not None}


def _generated(route: str, generated: Generated) -> dict[str, Any]:
    generation, params = generated.generation, generated.prompt.params
    speculation = generation.speculation()
    found = {
        "gen_ai.operation.name": _OPERATIONS.get(route),
        "gen_ai.provider.name": "saccade",
        "gen_ai.request.model": generated.model,
        "gen_ai.response.model": generated.model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.choice.count": len(generation.choices),
        "gen_ai.response.finish_reasons": generated.finish_reasons,
        "gen_ai.usage.input_tokens": generation.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": generation.cached_tokens,
        "gen_ai.usage.output_tokens": generation.completion_tokens,
        "gen_ai.latency.time_to_first_token": generated.first_token_seconds,
    }
    if speculation is not None:
        found |= {"saccade.steps": speculation.steps, "saccade.drafted": speculation.drafted}
        found |= {"saccade.accepted": speculation.accepted}
    return found


def _error(account: Account) -> str | None:
    """What went wrong on the server's side, also in the middle of a stream."""
    if account.generated is not None and account.generated.error is not None:
        return account.generated.error
    return str(account.status) if account.status >= 500 else None


def _name(account: Account) -> str:
    operation = _OPERATIONS.get(account.route)
    if operation is None or account.generated is None:
        return f"{account.method} {account.route}"
    return f"{operation} {account.generated.model}"
