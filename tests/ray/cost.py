"""What Ray costs a streamed event, in CPU time of the processes between the engine and the client.

    build/ray/bin/python -m tests.ray.cost

16 streams of 600 tokens of an engine that counts, an event for almost every token: by ``saccade serve``, and by one
replica behind Ray Serve.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.process.serving import COUNTING as SERVER
from tests.process.serving import command_line, serving
from tests.ray.cluster import COUNTING, Stream, cluster, descendants

STREAMS, TOKENS = 16, 600
FLAGS = f"--max-num-seqs {STREAMS}"


def measure(url: str, pids: list[int]) -> dict[str, float]:
    """Microseconds of CPU time of each process for an event; processes that do nothing are left out."""
    _load(url, 50)
    before = {pid: _cpu_seconds(pid) for pid in pids}
    events = _load(url, TOKENS)
    spent = {pid: (_cpu_seconds(pid) - before[pid]) / events * 1e6 for pid in pids}
    return {command_line(pid).split(" ")[0].strip(): micros for pid, micros in spent.items() if micros > 5}


def _load(url: str, tokens: int) -> int:
    """Events of all streams."""
    streams = [Stream(url, prompt=[20 + number], max_tokens=tokens) for number in range(STREAMS)]
    for stream in streams:
        stream.join()
    assert all(stream.whole for stream in streams)
    return sum(len(stream.lines) - 1 for stream in streams)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    with serving(*FLAGS.split(), program=SERVER) as server:
        print(f"saccade serve: {sum(measure(server.url, [server.process.pid]).values()):.0f} us an event")
    with cluster(f"demo/target {FLAGS}", replicas=1, engine=COUNTING) as ray:
        pids = [pid for pid in descendants(ray.process.pid) if "engine_process" not in command_line(pid)]
        for name, micros in measure(ray.url, pids).items():
            print(f"{name}: {micros:.0f} us an event")


if __name__ == "__main__":
    main()
