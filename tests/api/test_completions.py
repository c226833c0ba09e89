"""/v1/completions: exact shapes, all forms of prompts, n, echo, logprobs, stop strings, usage."""

from __future__ import annotations

import pytest

from decoding.messages import DrafterStats, SpeculationStats
from server.settings import ServerSettings
from tests.api.harness import EOS, api, events, fake, ids, saying, tokenizer

URL = "/v1/completions"


def test_whole_answer_has_exactly_openais_fields_and_ours() -> None:
    with api(saying("return n", "\n")) as client:
        response = client.post(URL, json={"model": "demo", "prompt": "def f(n): ", "seed": 7, "max_tokens": 4})
    body = response.json()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("system_fingerprint").startswith("fp_")
    prompt, completion = len(ids("def f(n): ")), len(ids("return n")) + len(ids("\n"))
    assert body == {
        "object": "text_completion",
        "model": "demo",
        "seed": 7,
        "choices": [{"index": 0, "text": "return n\n", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 2},
            "speculation": {
                "steps": 2,
                "drafted": 5,
                "accepted": 3,
                "tokens_per_step": round(completion / 2, 4),
                "by_drafter": {},
                "acceptance": "exact",
                "lossy": False,
            },
        },
    }


def test_stream_has_one_id_and_a_finish_reason_in_the_last_chunk_only() -> None:
    with api(saying("return", " n", "\n")) as client:
        chunks = events(client.post(URL, json={"prompt": "x", "stream": True, "seed": 3}))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["return", " n", "\n"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert all(
        set(chunk) == {"id", "object", "created", "model", "seed", "system_fingerprint", "choices"} for chunk in chunks
    )
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert {chunk["seed"] for chunk in chunks} == {3}


def test_stream_usage_comes_in_a_chunk_of_its_own_and_others_say_null() -> None:
    with api(saying("a", " b")) as client:
        body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = events(client.post(URL, json=body))
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    assert last["usage"]["speculation"]["steps"] == 2


def test_continuous_usage_grows_with_the_text() -> None:
    with api(saying("a", " b", " c")) as client:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = events(client.post(URL, json={"prompt": "x", "stream": True, "stream_options": options}))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("def f", [ids("def f")]),
        (["a", "b c"], [ids("a"), ids("b c")]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
    ],
)
def test_prompts_come_in_four_forms(prompt: object, expected: list[tuple[int, ...]]) -> None:
    engine = fake(saying("z"))
    with api(engine) as client:
        body = client.post(URL, json={"prompt": prompt}).json()
    assert sorted(request.prompt_ids for request in engine.requests) == sorted(expected)
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    with api() as client:
        whole = client.post(URL, json={"prompt": ["a", "b"], "n": 2, "max_tokens": 1}).json()
        stream = events(client.post(URL, json={"prompt": ["a", "b"], "n": 2, "max_tokens": 1, "stream": True}))
    assert [choice["text"] for choice in whole["choices"]] == ["a", "a", "b", "b"]
    texts = {chunk["choices"][0]["index"]: chunk["choices"][0]["text"] for chunk in stream}
    assert texts == {0: "a", 1: "a", 2: "b", 3: "b"}


def test_one_seed_for_all_choices_and_prompts_comes_back() -> None:
    engine = fake()
    with api(engine) as client:
        drawn = client.post(URL, json={"prompt": ["a", "b"], "n": 3, "max_tokens": 1}).json()["seed"]
    assert {request.params.seed for request in engine.requests} == {drawn}
    assert 0 <= drawn < 2**53


def test_requests_without_a_seed_differ_unless_the_server_has_one() -> None:
    with api() as client:
        seeds = {client.post(URL, json={"prompt": "a", "max_tokens": 1}).json()["seed"] for _ in range(5)}
    with api(settings=ServerSettings(("demo",), seed=11)) as client:
        fixed = client.post(URL, json={"prompt": "a", "max_tokens": 1}).json()["seed"]
    assert len(seeds) == 5
    assert fixed == 11


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_step_borders_cuts_text_tokens_and_usage(stream: bool) -> None:
    engine = fake(saying("one", " tw", "o three", " four", " five"))
    body = {"prompt": "x", "stop": ["two"], "stream": stream, "logprobs": 0}
    if stream:
        body["stream_options"] = {"include_usage": True}
    with api(engine) as client:
        response = client.post(URL, json=body)
    if stream:
        *chunks, last = events(response)
        texts = [chunk["choices"][0]["text"] for chunk in chunks]
        tokens = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
        text, usage, reason = "".join(texts), last["usage"], chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        text, usage, reason = choice["text"], response.json()["usage"], choice["finish_reason"]
        tokens = choice["logprobs"]["tokens"]
    completing = next(
        n for n in range(1, 9) if "two" in tokenizer().decode((ids("one") + ids(" tw") + ids("o three"))[:n])
    )
    assert (text, reason) == ("one ", "stop")
    assert usage["completion_tokens"] == len(tokens) == completing
    assert engine.cancelled[0][1] == 0


def test_a_stop_string_can_stay_in_the_text() -> None:
    with api(saying("one two three")) as client:
        body = client.post(URL, json={"prompt": "x", "stop": " two", "include_stop_str_in_output": True}).json()
    assert body["choices"][0]["text"] == "one two"


@pytest.mark.parametrize(("least", "text"), [(0, "one"), (1, "one"), (3, "one two three"), (4, None)])
def test_a_stop_string_before_min_tokens_is_text(least: int, text: str | None) -> None:
    said = ("one", " two", " three", " two", " four")
    with api(saying(*said)) as client:
        body = {"prompt": "x", "max_tokens": 16, "stop": [" two"], "min_tokens": least}
        choice = client.post(URL, json=body).json()["choices"][0]
    expected = ("".join(said), "length") if text is None else (text, "stop")
    assert (choice["text"], choice["finish_reason"]) == expected


def test_one_choice_that_stops_does_not_end_the_other() -> None:
    with api() as client:  # both choices say "a b a b ..."
        body = client.post(URL, json={"prompt": "a b c d", "n": 2, "max_tokens": 4, "stop": ["zzz"]}).json()
    assert [choice["text"] for choice in body["choices"]] == ["a b c d"] * 2


def test_what_may_become_a_stop_string_is_held_back_and_comes_out_at_the_end() -> None:
    with api(saying("one", " tw")) as client:
        chunks = events(client.post(URL, json={"prompt": "x", "stop": [" two"], "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one tw"
    assert chunks[0]["choices"][0]["text"] == "one"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_the_end_of_sequence_token_is_counted_and_scored_but_not_in_the_text() -> None:
    with api(saying("done", reason="stop")) as client:
        body = client.post(URL, json={"prompt": "x", "logprobs": 0, "skip_special_tokens": False}).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("done", "stop")
    assert body["usage"]["completion_tokens"] == len(ids("done")) + 1
    assert choice["logprobs"]["tokens"][-1] == tokenizer().token_text(EOS) == "<|endoftext|>"
    assert choice["logprobs"]["text_offset"][-1] == len("done")


def test_echo_begins_the_text_with_the_prompt() -> None:
    with api(saying(" n", "\n")) as client:
        whole = client.post(URL, json={"prompt": "return", "echo": True}).json()
        chunks = events(client.post(URL, json={"prompt": "return", "echo": True, "stream": True}))
        tokens = client.post(URL, json={"prompt": list(ids("return 7")), "echo": True}).json()
    assert whole["choices"][0]["text"] == "return n\n"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["return n", "\n"]
    assert tokens["choices"][0]["text"] == "return 7 n\n"


def test_echo_with_logprobs_scores_prompt_and_text_in_one_row_of_offsets() -> None:
    with api(saying(" n", reason="stop")) as client:
        (choice,) = client.post(URL, json={"prompt": "return x", "echo": True, "logprobs": 1}).json()["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "return x n"
    assert logprobs["tokens"] == ["return", " x", " n", "<|endoftext|>"]
    assert logprobs["text_offset"] == [0, 6, 8, 10]
    assert logprobs["token_logprobs"][:2] == [None, -2.0]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {" x": -2.0}


def test_echo_of_zero_tokens_scores_the_prompt_alone() -> None:
    engine = fake(saying(" never"))
    with api(engine) as client:
        body = client.post(URL, json={"prompt": "a b", "echo": True, "logprobs": 0, "max_tokens": 0}).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a b", "length")
    assert choice["logprobs"]["tokens"] == ["a", " b"]
    assert body["usage"]["completion_tokens"] == 0
    assert engine.requests[0].params.max_tokens == 1


def test_every_choice_echoes_the_scored_prompt() -> None:
    with api(saying("c")) as client:
        body = client.post(URL, json={"prompt": "a b", "echo": True, "logprobs": 0, "n": 3}).json()
    assert [choice["logprobs"]["tokens"] for choice in body["choices"]] == [["a", " b", "c"]] * 3


def test_the_chosen_token_is_in_its_top_logprobs_with_the_same_value() -> None:
    with api(saying("a b c")) as client:
        (choice,) = client.post(URL, json={"prompt": "x", "logprobs": 2}).json()["choices"]
    logprobs = choice["logprobs"]
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == value
        assert len(top) == 3


@pytest.mark.parametrize(
    "text", ["naïve — 漢字", "🙂👩‍👩‍👧", "line\u2028sep\u2029par\u0085nel", 'tab\tnul\x00quote"\\']
)
def test_any_text_survives_a_token_at_a_time(text: str) -> None:
    steps = [[token] for token in ids(text)]
    with api(saying(*steps)) as client:
        response = client.post(URL, json={"prompt": "x", "stream": True})
        whole = client.post(URL, json={"prompt": "x"}).json()
    assert "".join(chunk["choices"][0]["text"] for chunk in events(response)) == text
    assert whole["choices"][0]["text"] == text
    assert response.content.isascii()


def test_tokens_that_are_no_whole_character_have_distinct_names() -> None:
    steps = [[token] for token in ids("漢")]
    assert len(steps) > 1
    with api(saying(*steps)) as client:
        (choice,) = client.post(URL, json={"prompt": "x", "logprobs": 0}).json()["choices"]
    names = choice["logprobs"]["tokens"]
    assert all(name.startswith("bytes:\\x") for name in names)
    assert len(set(names)) == len(names)


def test_speculation_is_accounted_by_drafter_over_all_choices() -> None:
    stats = SpeculationStats(4, 10, 6, {"draft": DrafterStats(8, 5), "ngram": DrafterStats(4, 2)})
    with api(saying("a b c d", stats=stats)) as client:
        account = client.post(URL, json={"prompt": "x", "n": 2}).json()["usage"]["speculation"]
    assert account == {
        "steps": 8,
        "drafted": 20,
        "accepted": 12,
        "tokens_per_step": 1.0,
        "by_drafter": {"draft": {"drafted": 16, "accepted": 10}, "ngram": {"drafted": 8, "accepted": 4}},
        "acceptance": "exact",
        "lossy": False,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_lossy_text_is_marked(stream: bool) -> None:
    ask = {"prompt": "x", "n": 2, "stream": stream, "stream_options": {"include_usage": True} if stream else None}
    with api(saying("a b", stats=SpeculationStats(4, 10, 6, acceptance="typical"))) as client:
        response = client.post(URL, json=ask)
    answer = events(response)[-1] if stream else response.json()
    account = answer["usage"]["speculation"]
    assert (account["acceptance"], account["lossy"]) == ("typical", True)
