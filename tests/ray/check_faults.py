"""Replicas that die, come and go, with an engine that counts in place of a model: ``make test-ray``."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.api.harness import eventually
from tests.process.counting_engine import SLOW
from tests.ray.cluster import COUNTING, Cluster, Stream, cluster, running

FLAGS = "demo/target --max-num-seqs 8"
SECONDS = 0.05  # that the engine takes for a token


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    with cluster(FLAGS, ray={"num_replicas": 2, "health_check_period_s": 1}, engine=COUNTING) as started:
        yield started


def slow(cluster: Cluster, number: int, tokens: int) -> Stream:
    """A stream of so many tokens, which begins as no other does."""
    return Stream(cluster.url, prompt=[SLOW, 20 + number], max_tokens=tokens)


def both_have_some(cluster: Cluster, tokens: int) -> list[Stream]:
    """Streams under way, three or more on each of two replicas."""
    streams: list[Stream] = []
    for number in range(40):
        streams.append(slow(cluster, number, tokens))
        streams[-1].begun.wait(30)
        counts = [sum(each.replica == name for each in streams) for name in {each.replica for each in streams}]
        if len(counts) == 2 and min(counts) >= 3:
            return streams
    pytest.fail("all went to one replica")


def test_an_engine_that_is_killed_loses_its_own_requests_and_nobody_elses(pair: Cluster) -> None:
    before = pair.replicas()
    streams = both_have_some(pair, 100)
    engine, _ = next(iter(pair.engines().items()))
    os.kill(engine, signal.SIGKILL)
    assert all(pair.complete(prompt=[40 + n], max_tokens=3).status_code == 200 for n in range(20))  # as it restarts
    for stream in streams:
        stream.join()
    check_one_replica_died(streams)
    assert eventually(lambda: pair.replicas().keys() == before.keys(), 30)  # the engine came back, in its replica


def test_a_replica_that_is_killed_loses_its_own_requests_and_nobody_elses(pair: Cluster) -> None:
    before = pair.replicas()
    streams = both_have_some(pair, 100)
    engine, replica = next(iter(pair.engines().items()))
    os.kill(replica, signal.SIGKILL)
    assert eventually(lambda: not running([engine]), 10)  # it dies with its replica
    statuses = [pair.complete(prompt=[40 + n], max_tokens=3).status_code for n in range(20)]
    for stream in streams:
        stream.join()
    check_one_replica_died(streams)
    assert statuses.count(200) >= 18, statuses
    assert set(statuses) <= {200, 503}
    assert eventually(lambda: len(pair.replicas()) == 2, 60)
    assert len(pair.replicas().keys() - before.keys()) == 1  # another one
    assert [pair.complete(prompt=[60 + n], max_tokens=3).status_code for n in range(20)] == [200] * 20


def test_a_replica_whose_engine_cannot_live_is_replaced(pair: Cluster) -> None:
    before = pair.replicas()
    replica = next(iter(pair.engines().values()))

    def killed_until_another_came() -> bool:
        for engine, parent in pair.engines().items():
            if parent == replica:
                os.kill(engine, signal.SIGKILL)
        return not running([replica])

    assert eventually(killed_until_another_came, 120)
    assert eventually(lambda: len(pair.replicas()) == 2, 60)
    assert len(pair.replicas().keys() & before.keys()) == 1
    assert pair.complete(prompt=[9], max_tokens=2).status_code == 200


def check_one_replica_died(streams: list[Stream]) -> None:
    """Each of its streams had one error and its end, all others are whole."""
    dead = {stream.replica for stream in streams if not stream.whole}
    assert len(dead) == 1
    for stream in streams:
        assert stream.failure is None
        assert stream.lines[-1] == "data: [DONE]"
        assert [error["code"] for error in stream.errors] == (["engine_dead"] if stream.replica in dead else [])


@pytest.fixture(scope="module")
def single() -> Iterator[Cluster]:
    flags = "demo/target --max-num-seqs 64 --max-concurrent-requests 2 --write-timeout 1"
    with cluster(flags, replicas=1, engine=COUNTING) as started:
        yield started


def test_a_full_replica_says_429_itself(single: Cluster) -> None:
    streams = [slow(single, number, 60) for number in range(2)]
    for stream in streams:
        stream.begun.wait(30)
    refused = single.complete(prompt=[9], max_tokens=2)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "server_overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    for stream in streams:
        stream.join()
    assert all(stream.whole for stream in streams)


def test_nobody_runs_programs_without_the_token(single: Cluster) -> None:
    """CVE-2023-48022: the port to which Ray's jobs are sent."""
    answer = httpx.post("http://127.0.0.1:52365/api/job_agent/jobs/", json={"entrypoint": "id"})
    assert answer.status_code == 401


def test_a_client_that_reads_nothing_is_cut_off(single: Cluster) -> None:
    """Its answer has some 20 MB: far more than sockets hold, and than may wait anywhere."""
    body = json.dumps({"prompt": [20], "max_tokens": 900, "n": 100, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    [port] = single.replicas().values()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(single.url.rpartition(":")[2])))
        client.sendall(head.encode() + body)
        assert eventually(lambda: "did not read for 1 s was cut off" in single.log.read_text(), 30)
        assert eventually(lambda: single.metric(port, "saccade_running") == 0, 10)
    ended = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert re.search(r'saccade_choices_ended_total{.*reason="cancelled".*} [1-9]', ended)
    assert single.complete(prompt=[9], max_tokens=2).status_code == 200


def test_replicas_come_with_load_and_go_when_their_streams_have_ended() -> None:
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "look_back_period_s": 1}
    scaling |= {"metrics_interval_s": 0.5, "upscale_delay_s": 0.5, "downscale_delay_s": 2}
    ray = {"autoscaling_config": scaling, "graceful_shutdown_timeout_s": 60}
    with cluster(FLAGS, replicas=1, ray=ray, engine=COUNTING, max_imbalance=1) as scaled:
        streams = [slow(scaled, number, 500) for number in range(4)]  # 4 x 25 s of work, one after the other's token
        assert eventually(lambda: len(scaled.replicas()) == 2, 60)
        more = [slow(scaled, 10 + number, 60) for number in range(4)]
        for stream in more:
            stream.join()
        assert {stream.replica for stream in [*streams, *more]} == scaled.replicas().keys()
        lasting = [slow(scaled, 20 + number, 400) for number in range(2)]
        for stream in [*streams, *lasting]:
            stream.join()
        assert all(stream.whole for stream in [*streams, *more, *lasting])
        assert eventually(lambda: len(scaled.replicas()) == 1, 60)


@pytest.mark.parametrize("ctrl_c", [False, True])
def test_ending_the_server_lets_streams_finish(ctrl_c: bool) -> None:
    """By a signal to it, or by ctrl-C in a terminal, which reaches Ray's processes, too."""
    with cluster(FLAGS, replicas=1, engine=COUNTING) as one:
        stream = slow(one, 0, 60)
        stream.begun.wait(30)
        started = time.monotonic()
        if ctrl_c:
            os.killpg(one.process.pid, signal.SIGINT)
        else:
            one.process.send_signal(signal.SIGTERM)
        stream.join()
        assert stream.whole
        one.process.wait(60)
        assert time.monotonic() - started >= 50 * SECONDS
