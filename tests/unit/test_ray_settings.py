"""What a config file of Ray Serve says of replicas, and what ``saccade ray`` makes of it. Without Ray."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from decoding.errors import ConfigError
from server.limits import Limits
from server.ray.launch import APPLICATION, application_of, read_config, reason, set_environment
from server.ray.operations import OperationsServer
from server.ray.proxy_middleware import FLAGS, HOOK, HOOK_VALUE
from server.ray.replica_settings import ReplicaSettings

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docker" / "ray" / "serve.yaml"


def content() -> dict[str, Any]:
    return read_config(str(CONFIG))


def test_the_example_serves_the_demo_on_the_loopback_interface() -> None:
    application = application_of(content())
    settings = ReplicaSettings.of(application["args"])
    config, served, _ = settings.parsed()
    assert (ROOT / config.model / "config.json").is_file()
    assert content()["http_options"]["host"] == "127.0.0.1"
    assert len(settings.ports()) >= 4
    assert settings.metrics_host == "127.0.0.1"
    [deployment] = application["deployments"]
    assert deployment["graceful_shutdown_timeout_s"] > served.limits.shutdown_timeout
    assert deployment["autoscaling_config"]["target_ongoing_requests"] < config.max_num_seqs
    assert deployment["autoscaling_config"]["max_replicas"] <= len(settings.ports())


def test_a_replica_refuses_before_ray_does() -> None:
    settings = ReplicaSettings.of({"serve": "m --max-num-seqs 4 --max-queued-requests 8"})
    assert settings.most_requests() > 4 + 8
    settings = ReplicaSettings.of({"serve": "m --max-concurrent-requests 3"})
    assert 3 < settings.most_requests() < 100


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ({}, "need serve"),
        ({"serve": ["m"]}, "need serve"),
        ({"serve": "m", "max_imbalances": 3}, "did you mean 'max_imbalance'"),
        ({"serve": "m", "max_imbalance": 0}, "at least 1"),
        ({"serve": "m", "max_keys": True}, "at least 1"),
        ({"serve": "m --nope"}, "does not take"),
        ({"serve": ""}, "does not take"),
        ({"serve": "m --host 0.0.0.0"}, "http_options.host"),
        ({"serve": "m --port 9"}, "http_options.port"),
        ({"serve": "m --header-timeout 3"}, "load balancer"),
        ({"serve": "m --ssl-certfile c"}, "TLS"),
        ({"serve": "m --api-key sk-1"}, "SACCADE_API_KEY"),
        ({"serve": "m", "metrics_ports": "9400"}, "no range"),
        ({"serve": "m", "metrics_ports": "9415-9400"}, "no range"),
        ({"serve": "m", "metrics_ports": "65000-70000"}, "no range"),
    ],
)
def test_wrong_arguments_say_what_is_right(args: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        ReplicaSettings.of(args)


def test_the_environment_has_what_proxies_need_and_no_open_port() -> None:
    environment = {"SACCADE_API_KEY": "sk"}
    set_environment(environment, ReplicaSettings.of({"serve": "m --max-n 4"}), own=True)
    assert (environment[HOOK], environment[FLAGS]) == (HOOK_VALUE, "m --max-n 4")
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    theirs = {"RAY_AUTH_MODE": "disabled"}
    set_environment(theirs, ReplicaSettings.of({"serve": "m"}), own=True)
    assert "RAY_AUTH_TOKEN" not in theirs
    cluster: dict[str, str] = {}
    set_environment(cluster, ReplicaSettings.of({"serve": "m"}), own=False)
    assert HOOK not in cluster


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "cannot be read"),
        ("{", "no YAML"),
        ("[]", "is no config file"),
        ("applications: [{import_path: other:app}]", "not 0"),
        (f"applications: [{{import_path: '{APPLICATION}'}}, {{import_path: '{APPLICATION}'}}]", "not 2"),
    ],
)
def test_a_wrong_config_file_says_what_is_missing(text: str | None, part: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=part):
        application_of(read_config(str(file)))


def test_why_replicas_cannot_be_started_is_one_sentence_if_it_is_ours() -> None:
    traceback = (
        "Traceback (most recent call last):\n  File x\ndecoding.errors.ModelError: there is no folder 'm'; give one\n"
    )
    assert reason(["Failed to update.", f"It failed 3 times.\n{traceback}"]) == "there is no folder 'm'; give one"
    assert reason(["Failed.", "ImportError: torch"]) == "Failed.\nImportError: torch"


def test_each_replica_takes_a_port_and_shows_operations_only() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"42"})

    async def main() -> list[int]:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match="no port of metrics_ports"):
                OperationsServer(app, lambda *_: None, Limits(), "127.0.0.1", [port])
            server = OperationsServer(app, lambda *_: None, Limits(), "127.0.0.1", [port, 0])
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
            found = [
                (await client.get(path)).status_code for path in ("/metrics", "/health", "/v1/models", "/metrics/")
            ]
        await server.close()
        return found

    assert asyncio.run(main()) == [200, 200, 404, 404]
