"""Lines and spans of requests."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from decoding.errors import ConfigError
from server.app import build_app
from server.fake_client import Script
from server.log import JsonFormatter, set_up_log
from server.request_log import REQUESTS
from server.tracing import RequestTracer, open_tracer
from tests.api.harness import SETTINGS, api, fake, saying, tokenizer

SECRET = "the quick brown fox"


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What a log of JSON says of requests."""
    found: list[dict[str, Any]] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = JsonFormatter().format(record)
            assert "\n" not in text
            assert text.isascii()
            found.append(json.loads(text))

    logger, keeper = logging.getLogger(REQUESTS), Keeper()
    level = logger.level
    logger.addHandler(keeper)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(keeper)
    logger.setLevel(level)


def test_a_request_has_a_line_when_it_ends(lines: list[dict[str, Any]]) -> None:
    with api(saying(SECRET, "b")) as client:
        client.post("/v1/completions", json={"prompt": SECRET}, headers={"x-request-id": "mine-1"})
    (line,) = lines
    assert (line["level"], line["logger"], line["request_id"], line["status"]) == ("info", REQUESTS, "mine-1", 200)
    assert (line["method"], line["route"], line["model"]) == ("POST", "/v1/completions", "demo")
    assert line["prompt_tokens"] > 1
    assert line["completion_tokens"] > 1
    assert (line["cached_tokens"], line["finish_reasons"]) == (2, ["length"])
    assert (line["steps"], line["drafted"], line["accepted"]) == (2, 5, 3)
    assert 0 < line["time_to_first_token"] <= line["duration"]
    assert "quick" not in json.dumps(line)


def test_a_refusal_has_a_short_line_and_a_failure_its_code(lines: list[dict[str, Any]]) -> None:
    with api(saying("a", "b", reason="error")) as client:
        client.post("/v1/completions", json={"prompt": SECRET, "temperature": -1})
        client.post("/v1/completions", json={"prompt": SECRET, "stream": True})
    refused, failed = lines
    assert refused["status"] == 400
    assert "prompt_tokens" not in refused
    assert (failed["status"], failed["error"], failed["finish_reasons"]) == (200, "internal_error", ["error"])


def test_probes_have_no_lines_unless_they_fail(lines: list[dict[str, Any]]) -> None:
    engine = fake()
    with api(engine) as client:
        for route in ("/health", "/ready", "/live", "/metrics"):
            client.get(route)
        assert not lines
        engine.die()
        client.get("/health")
    assert [line["status"] for line in lines] == [503]


def test_an_exception_is_one_line() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError as error:
        record = logging.LogRecord("saccade", logging.ERROR, "", 1, "%s\nc", ("x",), (ValueError, error, None))
    text = JsonFormatter().format(record)
    assert "\n" not in text
    found = json.loads(text)
    assert (found["message"], found["level"]) == ("x\nc", "error")
    assert "ValueError: a\nb" in found["exception"]


@pytest.mark.parametrize(
    ("form", "level", "ours", "requests"),
    [
        ("text", "info", logging.INFO, logging.WARNING),
        ("text", "debug", logging.DEBUG, logging.DEBUG),
        ("json", "info", logging.INFO, logging.INFO),
        ("json", "error", logging.ERROR, logging.ERROR),
    ],
)
def test_levels(form: Any, level: Any, ours: int, requests: int) -> None:
    loggers = [logging.getLogger(name) for name in (None, "saccade", REQUESTS)]
    kept = [logger.level for logger in loggers]
    formatters = [handler.formatter for handler in loggers[0].handlers]
    try:
        set_up_log(form, level)
        assert (loggers[1].level, loggers[2].level) == (ours, requests)
        assert loggers[0].level == max(ours, logging.WARNING)
        assert all(isinstance(each.formatter, JsonFormatter) == (form == "json") for each in loggers[0].handlers)
    finally:
        for logger, before in zip(loggers, kept, strict=True):
            logger.setLevel(before)
        for handler, formatter in zip(loggers[0].handlers, formatters, strict=True):
            handler.setFormatter(formatter)


def traced(script: Script, *bodies: dict[str, Any], **headers: str) -> list[ReadableSpan]:
    """The spans of requests."""
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(SimpleSpanProcessor(exporter))
    app = build_app(fake(script), tokenizer(), SETTINGS, tracer=tracer)
    client = TestClient(app, raise_server_exceptions=False)
    for body in bodies:
        client.post("/v1/completions", json=body, headers=headers)
    client.get("/health")
    spans = list(exporter.get_finished_spans())
    tracer.close()
    return spans


def test_a_request_is_a_span_under_its_clients() -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"prompt": SECRET, "max_tokens": 7, "temperature": 0.5}
    (span,) = traced(saying(SECRET, "b"), body, traceparent=f"00-{trace}-{parent}-01")
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace, parent)
    assert (span.name, span.kind.name, span.status.status_code.name) == ("text_completion demo", "SERVER", "UNSET")
    found = dict(span.attributes or {})
    assert found["gen_ai.operation.name"] == "text_completion"
    assert (found["gen_ai.request.model"], found["gen_ai.request.max_tokens"]) == ("demo", 7)
    assert found["gen_ai.request.temperature"] == 0.5
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert (found["http.route"], found["http.response.status_code"]) == ("/v1/completions", 200)
    assert (found["saccade.drafted"], found["saccade.accepted"]) == (5, 3)
    assert "quick" not in str(found)
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time < span.end_time


def test_spans_of_requests_that_fail() -> None:
    refused, failed = traced(
        saying("a", "b", reason="error"), {"prompt": "x", "n": 0}, {"prompt": "x", "stream": True}, traceparent="no"
    )
    assert (refused.name, refused.status.status_code.name, refused.parent) == ("POST /v1/completions", "UNSET", None)
    assert (failed.status.status_code.name, dict(failed.attributes or {})["error.type"]) == ("ERROR", "internal_error")


def test_spans_reach_a_collector() -> None:
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nothing: pytest shows what is printed."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        tracer = open_tracer(f"http://127.0.0.1:{server.server_port}")
        app = build_app(fake(saying("a")), tokenizer(), SETTINGS, tracer=tracer)
        TestClient(app).post("/v1/completions", json={"prompt": "x"})
        tracer.close()
        server.shutdown()
        thread.join()
    ((path, request),) = received
    (resource,) = request.resource_spans
    assert path == "/v1/traces"
    assert resource.scope_spans[0].spans[0].name == "text_completion demo"
    assert "saccade" in [each.value.string_value for each in resource.resource.attributes if each.key == "service.name"]


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://127.0.0.1:4317", "http://"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="4318/v1/traces"):
        open_tracer(endpoint)
