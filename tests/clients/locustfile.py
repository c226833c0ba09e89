"""What Locust's users do: completions, whole and in streams, each checked to its last byte."""

from __future__ import annotations

import json
from typing import Any

from locust import FastHttpUser, events, task

ASK = {"model": "demo", "prompt": "def fib(n):\n", "max_tokens": 16}


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any, **_: Any) -> None:
    parser.add_argument("--api-key", default="none")


class Reader(FastHttpUser):
    """Reads an answer and asks again."""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.environment.parsed_options.api_key}"}

    @task
    def whole(self) -> None:
        with self.client.post(
            "/v1/completions", json=ASK, headers=self.headers, name="whole", catch_response=True
        ) as response:
            if response.status_code != 200 or response.json()["usage"]["completion_tokens"] < 1:
                response.failure(f"{response.status_code}: {response.text[:200]}")

    @task
    def stream(self) -> None:
        ask = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
        with self.client.post(
            "/v1/completions", json=ask, headers=self.headers, name="stream", catch_response=True
        ) as response:
            frames = (response.text or "").split("\n\n")
            if response.status_code != 200 or frames[-2:] != ["data: [DONE]", ""]:
                response.failure(f"{response.status_code}: ends in {frames[-2:]}")
                return
            chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2] if frame.startswith("data: ")]
            if chunks[-1]["usage"]["completion_tokens"] < 1 or any("error" in chunk for chunk in chunks):
                response.failure(f"last chunk: {chunks[-1]}")
