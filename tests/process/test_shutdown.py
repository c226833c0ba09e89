"""The end of a server: who is told, who may finish, what is left. And an engine that hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from decoding.config import EngineConfig
from decoding.errors import ConfigError, EngineDeadError
from decoding.request import GenerateRequest, SamplingParams
from server.cli import parse
from server.engine_client import EngineClient
from server.limits import Limits
from server.security import Tls
from server.serve_flags import tls
from server.socket_client import SocketEngineClient
from server.supervisor import RestartPolicy, Supervisor
from tests.api.harness import eventually
from tests.process.counting_engine import CRASH, HANG, SLOW
from tests.process.serving import COUNTING, ROOT, run, serving

pytestmark = pytest.mark.process

ENGINE = "tests.process.counting_engine:CountingEngine"
STREAM = {"prompt": [SLOW], "max_tokens": 900, "stream": True}  # 45 seconds


class Stream(threading.Thread):
    """A streamed request that somebody reads to its end."""

    def __init__(self, url: str, body: dict[str, Any] = STREAM) -> None:
        super().__init__()
        self._url, self._body = url, body
        self.lines: list[str] = []
        self.begun = threading.Event()
        self.start()
        self.begun.wait(20)

    def run(self) -> None:
        with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=60) as response:
            for line in response.iter_lines():
                self.lines += [line] if line else []
                self.begun.set()


def test_a_drain_tells_who_asks_and_lets_who_streams_finish() -> None:
    with serving("--shutdown-timeout", "20", program=COUNTING) as server:
        stream = Stream(server.url, {**STREAM, "max_tokens": 80})
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert httpx.get(f"{server.url}/health").json()["status"] == "draining"
        assert httpx.get(f"{server.url}/live").status_code == 200
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": [1]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        assert server.process.poll() is None
        stream.join()
        assert server.process.wait(20) == 0
    assert stream.lines[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in stream.lines[-2]
    assert not any('"error"' in line for line in stream.lines)


@pytest.mark.parametrize("body", [{**STREAM, "n": 3}, {**STREAM, "prompt": [[SLOW], [SLOW]]}])
def test_a_drain_ends_in_time_with_one_error_and_done(body: dict[str, Any]) -> None:
    with serving("--shutdown-timeout", "0.2", program=COUNTING) as server:
        stream = Stream(server.url, body)
        status, _ = server.end(signal.SIGTERM)
        stream.join()
    assert status == 0
    assert stream.lines[-1] == "data: [DONE]"
    assert [line for line in stream.lines if '"error"' in line] == [stream.lines[-2]]
    assert '"code":"draining"' in stream.lines[-2]
    assert "Traceback" not in "".join(server.log)


def test_an_idle_server_ends_at_once() -> None:
    with (
        serving("--shutdown-timeout", "60", program=COUNTING) as server,
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))),
    ):
        status, seconds = server.end(signal.SIGTERM)
    assert status == 0
    assert seconds < 20  # not the minute that a request would have had


def test_a_second_signal_does_not_wait() -> None:
    with serving("--shutdown-timeout", "60", program=COUNTING) as server:
        stream = threading.Thread(target=lambda: _to_its_end(server.url))
        stream.start()
        assert eventually(lambda: server.metrics()["saccade_running"] > 0)
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        status, _ = server.end(signal.SIGTERM)
        stream.join()
    assert status == 130


def _to_its_end(url: str) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"{url}/v1/completions", json=STREAM, timeout=60)


def test_a_signal_while_the_model_loads_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "slow").symlink_to(ROOT / "demo" / "target")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*COUNTING[:-1], str(tmp_path / "slow"), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert eventually(lambda: _status(port) == 503, 60)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 0
    assert "Traceback" not in said
    assert "ready" not in said


def test_a_model_that_cannot_be_loaded_leaves_nobody_half_connected(tmp_path: Path) -> None:
    """Somebody connects in the very moment in which the event loop ends: "Task was destroyed but it is pending!"."""
    (tmp_path / "late").symlink_to(ROOT / "demo" / "target")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ended = threading.Event()

    def knock() -> None:
        while not ended.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as opened:
                    opened.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                    opened.recv(1000)
            except OSError:
                time.sleep(0.002)

    command = [*COUNTING[:-1], str(tmp_path / "late"), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        knocking = [threading.Thread(target=knock) for _ in range(4)]
        for each in knocking:
            each.start()
        said = process.communicate(timeout=60)[1]
        ended.set()
        for each in knocking:
            each.join()
    assert process.returncode == 1
    assert "the last shard is torn" in said
    assert "Task was destroyed" not in said


def _status(port: int) -> int:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=10).status_code
    except httpx.TransportError:
        return 0


# an engine that hangs ------------------------------------------------------------------------------------------------


def test_a_hung_engine_is_killed_and_replaced() -> None:
    async def main() -> None:
        made: list[SocketEngineClient] = []

        def make() -> EngineClient:
            made.append(SocketEngineClient(EngineConfig("m"), engine=ENGINE, limits=Limits(watchdog_timeout=0.6)))
            return made[-1]

        supervisor = Supervisor(make, RestartPolicy(first_delay=0.01))
        await supervisor.start()
        await asyncio.sleep(1.0)  # an engine without work may be silent for as long as it likes
        assert supervisor.restarts == 0
        others = [asyncio.create_task(_tokens(supervisor, f"r{i}", (1, 2), 900)) for i in range(3)]
        hanging = asyncio.create_task(_tokens(supervisor, "hangs", (1, HANG), 5))
        for result in await asyncio.gather(hanging, *others, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
        async with asyncio.timeout(20):
            while supervisor.state != "ready":
                await asyncio.sleep(0.01)
        assert await _tokens(supervisor, "after", (1, 2), 3) == [1, 2, 1]
        assert (supervisor.restarts, len(made)) == (1, 2)
        await supervisor.close()

    asyncio.run(main())


def test_an_engine_that_works_is_not_taken_for_hung() -> None:
    async def main() -> None:
        client = SocketEngineClient(EngineConfig("m"), engine=ENGINE, limits=Limits(watchdog_timeout=0.4))
        await client.start()
        assert len(await _tokens(client, "long", (1, 2), 600)) == 600  # three times as long at least
        await client.close()

    asyncio.run(main())


async def _tokens(client: EngineClient, name: str, prompt: tuple[int, ...], count: int) -> list[int]:
    request = GenerateRequest(name, prompt, SamplingParams(max_tokens=count))
    return [token async for event in client.generate(request) for token in event.token_ids]


# what can be seen from outside ---------------------------------------------------------------------------------------


def test_the_engines_socket_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def main() -> None:
        client = SocketEngineClient(EngineConfig("m"), engine=ENGINE)
        starting = asyncio.create_task(client.start())
        async with asyncio.timeout(20):
            while not list(tmp_path.glob("*/engine")):
                await asyncio.sleep(0.001)
        (folder,) = tmp_path.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == os.getuid()
        await starting
        assert not list(tmp_path.iterdir())  # both ends are connected: nobody can connect any more
        await client.close()

    asyncio.run(main())


def test_a_key_is_on_no_engines_command_line_and_in_no_log(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-in-a-file\n")
    with serving("--api-key-file", str(keys), program=COUNTING, SACCADE_API_KEY="sk-in-the-environment") as server:
        for key, status in (("sk-in-a-file", 200), ("sk-in-the-environment", 200), ("sk-wrong", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            response = httpx.post(f"{server.url}/v1/completions", json={"prompt": [1]}, headers=headers)
            assert response.status_code == status
        crashed = httpx.post(
            f"{server.url}/v1/completions", json={"prompt": [CRASH]}, headers={"Authorization": "Bearer sk-in-a-file"}
        )
        assert (crashed.status_code, crashed.json()["error"]["code"]) == (503, "engine_dead")
        for telling in ("/", "signal", "status", "Error"):  # nothing of this machine
            assert telling not in crashed.json()["error"]["message"]
        command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        assert b"sk-" not in command
        server.end()
    assert "sk-" not in "".join(server.log)


def test_who_listens_to_the_world_without_a_key_is_told() -> None:
    with serving("--host", "0.0.0.0", program=COUNTING) as server:
        server.end()
    assert "no API key is set" in "".join(server.log)


def test_tls_with_and_without_certificates_of_clients(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    client = tmp_path / "client.pem"
    authority.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(str(client))
    flags = ("--ssl-certfile", str(tmp_path / "server.pem"), "--ssl-ca-certs", str(tmp_path / "ca.pem"))
    with serving(*flags, program=COUNTING) as server:
        assert server.url.startswith("https://")
        known, anonymous = ssl.create_default_context(), ssl.create_default_context()
        for context in (known, anonymous):
            authority.configure_trust(context)
        known.load_cert_chain(client)
        assert httpx.get(f"{server.url}/health", verify=known).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health", verify=anonymous)
        server.end()


def test_tls_files_that_do_not_fit_are_known_before_a_model_is_loaded(tmp_path: Path) -> None:
    done = run("serve", "no/such/model", "--ssl-certfile", "nowhere.pem", "--port", "0", seconds=60)
    assert done.returncode == 1
    assert "no file 'nowhere.pem', which --ssl-certfile names" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    empty, key = tmp_path / "empty.pem", tmp_path / "key.pem"
    empty.write_text("")
    issued = [trustme.CA().issue_cert("127.0.0.1") for _ in range(2)]
    issued[0].private_key_pem.write_to_path(str(key))
    issued[1].cert_chain_pems[0].write_to_path(str(tmp_path / "other.pem"))
    for files in (Tls(str(empty)), Tls(str(tmp_path / "other.pem"), str(key)), Tls(str(key), str(key), str(empty))):
        with pytest.raises(ConfigError, match="TLS cannot be set up"):
            files.context()
    with pytest.raises(ConfigError, match="need --ssl-certfile"):
        tls(parse(["serve", "m", "--ssl-keyfile", "key.pem"]))


def test_while_the_model_loads_health_says_so(tmp_path: Path) -> None:
    (tmp_path / "slow").symlink_to(ROOT / "demo" / "target")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    seen: list[tuple[int, str]] = []

    def watch() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and (200, "ready") not in seen:
            try:
                answer = httpx.get(f"{url}/health", timeout=10)
                seen.append((answer.status_code, answer.json()["status"]))
            except httpx.TransportError:
                time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    with serving(str(tmp_path / "slow"), "--port", str(port), program=COUNTING[:-1]) as server:
        watching.join()
        server.end()
    assert seen[-1] == (200, "ready")
    assert set(seen[:-1]) == {(503, "loading")}
