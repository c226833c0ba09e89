"""Spans of OpenTelemetry: a request's and those of its parts, made when it has been answered, so that a stream costs
nothing meanwhile.

Names are those of the semantic conventions for HTTP and generative AI; what these have no name for is called as vLLM
calls it, or "saccade.…". No prompt and no output is told.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
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
_LARGEST = 2**63  # OTLP has no larger integers: one would cost the whole batch of spans


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
        """The spans of a request; children of the client's own, if it sent a ``traceparent``."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        ended, now = time.time_ns(), time.monotonic()
        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _TRACE_HEADERS}
        span = self._tracer.start_span(
            _name(account),
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes(account, scope),
            start_time=ended - int(1e9 * account.seconds),
        )
        if _failure(account) is not None:
            span.set_status(Status(StatusCode.ERROR))
        if account.generated is not None:
            inside = set_span_in_context(span)
            for name, (begin, end), told in parts(account.generated):
                first, last = (ended - int(1e9 * (now - moment)) for moment in (begin, end))
                self._tracer.start_span(name, context=inside, attributes=told, start_time=first).end(last)
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


def parts(generated: Generated) -> Iterator[tuple[str, tuple[float, float], dict[str, Any]]]:
    """The parts of a request that got tokens: until its place in the batch, until its first token, until its last.

    Yields:
        (name, (begin, end) in seconds of ``time.monotonic``, attributes).
    """
    times, generation = generated.times, generated.generation
    if times.scheduled is None or times.first is None or times.last is None:
        return
    yield "queue", (times.submitted, times.scheduled), {}
    prompt = {
        "gen_ai.usage.input_tokens": generation.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": generation.cached_tokens,
    }
    yield "prefill", (times.scheduled, times.first), prompt
    output = {"gen_ai.usage.output_tokens": generation.completion_tokens, **_speculation(generated)}
    yield "decode", (times.first, times.last), output


def attributes(account: Account, scope: Scope) -> dict[str, Any]:
    """What a request's span tells."""
    found: dict[str, Any] = _address(scope) | {
        "http.request.method": account.method,
        "http.route": account.route,
        "http.response.status_code": account.status,
        "saccade.request_id": account.request_id,
        "error.type": _failure(account),
    }
    if account.generated is not None:
        found |= _asked(account.route, account.generated) | _answered(account, account.generated)
        found |= _latencies(account.generated, account.seconds) | _speculation(account.generated)
    return {name: value for name, value in found.items() if value is not None}


def _asked(route: str, generated: Generated) -> dict[str, Any]:
    params = generated.prompt.params
    return {
        "gen_ai.operation.name": _OPERATIONS.get(route),
        "gen_ai.provider.name": "saccade",
        "gen_ai.request.model": generated.model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k if params.top_k > 0 else None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
        "gen_ai.request.seed": params.seed if (params.seed or 0) < _LARGEST else None,
        "gen_ai.request.choice.count": len(generated.generation.choices),
    }


def _answered(account: Account, generated: Generated) -> dict[str, Any]:
    generation = generated.generation
    return {
        "gen_ai.response.model": generated.model,
        "gen_ai.response.finish_reasons": account.finish_reasons,
        "gen_ai.usage.input_tokens": generation.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": generation.cached_tokens,
        "gen_ai.usage.output_tokens": generation.completion_tokens,
    }


def _latencies(generated: Generated, seconds: float) -> dict[str, Any]:
    """In seconds, by the names that vLLM's spans have for them."""
    lengths = {name: end - begin for name, (begin, end), _ in parts(generated)}
    return {
        "gen_ai.latency.time_to_first_token": generated.first_token_seconds,
        "gen_ai.latency.e2e": seconds,
        "gen_ai.latency.time_in_queue": lengths.get("queue"),
        "gen_ai.latency.time_in_model_prefill": lengths.get("prefill"),
        "gen_ai.latency.time_in_model_decode": lengths.get("decode"),
    }


def _speculation(generated: Generated) -> dict[str, Any]:
    stats = generated.generation.speculation()
    if stats is None:
        return {}
    return {"saccade.steps": stats.steps, "saccade.drafted": stats.drafted, "saccade.accepted": stats.accepted}


def _address(scope: Scope) -> dict[str, Any]:
    """Where the request came in."""
    server = scope.get("server")
    if not server or server[1] is None:
        return {}
    return {"server.address": server[0], "server.port": server[1]}


def _failure(account: Account) -> str | None:
    """What went wrong on the server's side, also in the middle of a stream."""
    if account.error is not None and account.error.status >= 500:
        return account.error.code
    return str(account.status) if account.status >= 500 else None


def _name(account: Account) -> str:
    operation = _OPERATIONS.get(account.route)
    if operation is None or account.generated is None:
        return f"{account.method} {account.route}"
    return f"{operation} {account.generated.model}"
