"""`saccade bench` as a whole, on servers that do what a test tells them to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.cli import main, parse
from decoding.errors import ConfigError
from decoding.text import Tokenizer
from server import cli
from tests.load_servers import Body, Script, fake_server

ROOT = Path(__file__).parents[2]
QUICK = ["--no-progress", "--random-input-len", "4", "--random-output-len", "4"]


def bench(out: Path, *words: str) -> dict[str, Any]:
    """The JSON of a run that succeeds."""
    assert main([*QUICK, *words, "--output", str(out)]) == 0
    return dict(json.loads(out.read_text()))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "result.json"


def test_a_planted_slowdown_is_found(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server(Script(gap=0.05)) as fast, fake_server(Script(gap=0.2)) as slow:
        load = ["--concurrency", "4", "--num-prompts", "24"]
        found = bench(out, "--base-url", fast.url, "--vs", slow.url, *load, "--html", str(out.with_suffix(".html")))
    ratios = {ratio["metric"]: ratio for ratio in found["ratios"]}
    for metric in ("TPOT (median)", "ITL (mean)", "end to end (median)", "output tokens/s"):
        assert ratios[metric]["verdict"] == "slower", ratios[metric]
        assert ratios[metric]["rounds"] == 6
    assert 1.0 < ratios["TPOT (median)"]["low"] <= ratios["TPOT (median)"]["value"] < 5.0
    assert ratios["output tokens/s"]["high"] < 1.0
    assert found["texts"] == {"pairs": 24, "same": 24}
    assert re.search(r"TPOT \(median\) +[1-9]\.\d+ \[.*\] +slower", capsys.readouterr().out)
    assert "B is slower: TPOT (median), 4 at once: B has" in out.with_suffix(".html").read_text()


def test_both_servers_get_the_same_requests_in_turns(out: Path) -> None:
    with fake_server(Script()) as one, fake_server(Script()) as other:
        bench(out, "--base-url", one.url, "--vs", other.url, "--num-prompts", "6", "--rounds", "3")
    assert [body["prompt"] for body in one.bodies] == [body["prompt"] for body in other.bodies]
    assert [body["seed"] for body in one.bodies] == [body["seed"] for body in other.bodies]
    assert len(one.bodies) == 1 + 6


def faults(body: Body, number: int) -> Script:
    """Nothing is wrong with the first request; then every kind of failure comes, and successes between them."""
    kinds = (
        Script(error="the engine is gone"),
        Script(done=False),
        Script(status=503),
        Script(chunks=(1, 1), first=30.0),
        Script(),
    )
    return Script() if number == 0 else kinds[(number - 1) % len(kinds)]


def test_errors_are_counted_by_kind_and_are_no_successes(out: Path) -> None:
    with fake_server(faults) as server:
        words = ["--base-url", server.url, "--num-prompts", "10", "--concurrency", "5", "--timeout", "1.5"]
        (summary,) = bench(out, *words)["summaries"]
    assert summary["errors"] == {"error in stream": 2, "truncated": 2, "http 503": 2, "timeout": 2}
    assert (summary["requests"], summary["succeeded"], summary["output_tokens"]) == (10, 2, 8)
    assert summary["failed"]["p50"] < 1500 <= summary["failed"]["max"], "only those that timed out took so long"


def test_the_notes_quote_errors(out: Path) -> None:
    with fake_server(faults) as server:
        words = ["--base-url", server.url, "--num-prompts", "5", "--timeout", "1.5"]
        notes = bench(out, *words)["notes"]
    assert "server, error in stream: the engine is gone" in notes
    assert "server, truncated: the stream ended without [DONE]" in notes
    assert "server, http 503: no" in notes


def test_a_server_that_fails_always_is_a_failure() -> None:
    with fake_server(lambda body, number: Script(error="gone") if number else Script()) as server:
        assert main([*QUICK, "--base-url", server.url, "--num-prompts", "2"]) == 1


def test_a_closed_loop_keeps_so_many_in_flight(out: Path) -> None:
    with fake_server(Script(gap=0.01)) as server:
        found = bench(out, "--base-url", server.url, "--concurrency", "3", "--num-prompts", "9")
    assert server.most == 3
    assert found["summaries"][0]["succeeded"] == 9


def test_a_sweep_has_a_summary_for_each_load(out: Path) -> None:
    with fake_server(Script()) as server:
        loads = ["--concurrency", "1", "2", "--request-rate", "200", "inf", "--num-prompts", "4"]
        found = bench(out, "--base-url", server.url, *loads, "--html", str(out.with_suffix(".html")))
    assert len({body["prompt"] for body in server.bodies[1:]}) == 16  # no cache knows any of them from another load
    assert [each["load"] for each in found["summaries"]] == ["1 at once", "2 at once", "200/s poisson", "all at once"]
    assert len(found["requests"]) == 16
    page = out.with_suffix(".html").read_text()
    assert page.count("<svg") == 3
    assert "http://www.w3.org" in page
    assert not re.search(r'(?:src|href)="(?!#)', page.replace('xlink:href="#', ""))  # nothing is fetched from elsewhere


def test_an_open_loop_does_not_wait_for_answers(out: Path) -> None:
    """Ten requests in half a second, each of which takes more than that: all are under way together."""
    with fake_server(Script(first=1.5, chunks=(1,))) as server:
        words = ["--request-rate", "20", "--arrival", "constant", "--num-prompts", "10"]
        found = bench(out, "--base-url", server.url, *words)
    assert server.most == 10
    times = [request["scheduled_ms"] for request in found["requests"]]
    assert times == pytest.approx([50.0 * number for number in range(10)], abs=1e-3), "the schedule is the load's"
    assert all(request["sent_ms"] < 1500 for request in found["requests"])


def test_an_open_loop_counts_the_time_that_requests_wait(out: Path) -> None:
    with fake_server(Script(first=0.05, chunks=(1,))) as server:
        words = ["--request-rate", "inf", "--num-prompts", "4", "--max-concurrency", "1"]
        (summary,) = bench(out, "--base-url", server.url, *words)["summaries"]
    assert server.most == 1
    assert summary["ttft"]["max"] >= 4 * 50  # the last one waited for three others
    assert summary["ttft_sent"]["p50"] < summary["ttft"]["p50"]
    assert summary["late"]["max"] >= 3 * 50


def test_a_duration_ends_the_sending_and_not_the_answers(out: Path) -> None:
    with fake_server(Script(gap=0.02)) as server:
        (summary,) = bench(out, "--base-url", server.url, "--duration", "0.3", "--concurrency", "2")["summaries"]
    assert summary["succeeded"] == summary["requests"] == len(server.bodies) - 1
    assert summary["seconds"] == pytest.approx(0.3)
    assert summary["request_rate"] * summary["seconds"] <= summary["requests"] - 2  # two were under way at the end
    assert summary["requests"] >= 2


def test_goodput_counts_requests_that_meet_every_target(out: Path) -> None:
    with fake_server(lambda body, number: Script(chunks=(1, 1), gap=0.5 if number % 2 else 0.0)) as server:
        words = ["--num-prompts", "8", "--goodput", "ttft:5000", "tpot:300"]
        (summary,) = bench(out, "--base-url", server.url, *words)["summaries"]
    assert summary["good_share"] == 0.5
    assert summary["good_rate"] == pytest.approx(summary["request_rate"] / 2)


def test_what_speculation_did_is_told(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    account = {"steps": 2, "drafted": 8, "accepted": 2, "by_drafter": {"ngram": {"drafted": 8, "accepted": 2}}}
    with fake_server(Script(chunks=(1, 3), gap=0.1, account=account)) as server:
        (summary,) = bench(out, "--base-url", server.url, "--num-prompts", "3")["summaries"]
    assert (summary["speculation"]["drafted"], summary["speculation"]["accepted"]) == (24, 6)
    assert summary["speculation"]["tokens_per_step"] == 2.0
    assert summary["tokens_per_chunk"] == 2.0
    assert "6 of 24 (25%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "source"),
    [
        (Script(), "usage of each chunk"),
        (Script(usage="final"), "usage of the last chunk"),
        (Script(refuse="continuous_usage_stats"), "usage of the last chunk"),
        (Script(usage="none"), "chunks"),
        (Script(refuse="include_usage"), "chunks"),
    ],
)
def test_the_report_says_how_tokens_were_counted(script: Script, source: str, out: Path) -> None:
    with fake_server(script) as server:
        found = bench(out, "--base-url", server.url, "--num-prompts", "2")
    assert found["summaries"][0]["source"] == source
    assert any("does not count tokens" in note for note in found["notes"]) == (source == "chunks")


def test_texts_are_counted_by_a_tokenizer_where_the_server_counts_nothing(out: Path) -> None:
    with fake_server(Script(chunks=(4, 8, 8), gap=0.01, usage="none")) as server:
        words = ["--base-url", server.url, "--num-prompts", "2", "--tokenizer", str(ROOT / "demo/target")]
        found = bench(out, *words)
    made = len(Tokenizer.load(ROOT / "demo/target").encode("a" * 20, add_special_tokens=False))
    (summary,) = found["summaries"]
    assert made != 3, "chunks are no tokens"
    assert (summary["source"], summary["output_tokens"]) == ("tokenizer", 2 * made)
    assert summary["tpot"]["p50"] == pytest.approx(2 * summary["itl"]["mean"] / (made - 1), rel=0.5)
    assert not any("does not count tokens" in note for note in found["notes"])


def test_counters_of_a_server_tell_of_speculation_where_its_answers_do_not(out: Path) -> None:
    names = {
        f"vllm:spec_decode_num_{each}": n for each, n in (("drafts", 2), ("draft_tokens", 8), ("accepted_tokens", 3))
    }
    with fake_server(Script(metrics=names)) as server:
        found = bench(out, "--base-url", server.url, "--num-prompts", "4", "--concurrency", "2")
    (summary,) = found["summaries"]
    speculation = {"drafted": 32, "accepted": 12, "tokens_per_step": 2.5, "by_drafter": {}, "counters": True}
    assert summary["speculation"] == speculation, "the request that greeted the server is not in it"
    assert (
        "server tells of speculation in its counters only, which have all clients' requests in them" in found["notes"]
    )


def test_figures_are_told_by_category(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("writing", "math", "writing")
    path = out.with_name("question.jsonl")
    path.write_text(
        "".join(json.dumps({"category": kind, "turns": [f"{kind} {n}"]}) + "\n" for n, kind in enumerate(kinds))
    )
    account = {"steps": 2, "drafted": 8, "accepted": 2, "by_drafter": {}}
    script = Script(chunks=(1, 3), account=account)
    with fake_server(lambda body, number: script if "math" in body["prompt"] else Script()) as server:
        page = out.with_suffix(".html")
        words = ["--base-url", server.url, "--num-prompts", "3", "--dataset-path", str(path), "--html", str(page)]
        found = {each["category"]: each for each in bench(out, *words)["categories"]}
    assert {name: each["requests"] for name, each in found.items()} == {"writing": 2, "math": 1}
    assert found["math"]["speculation"]["tokens_per_step"] == 2.0
    assert found["writing"]["speculation"] is None
    assert re.search(r"^math +server +1 .* 2 of 8 \(25%\) +2\.00$", capsys.readouterr().out, re.MULTILINE)
    assert "<h2>By category</h2>" in page.read_text()


def test_an_answer_without_text_says_nothing_of_how_tokens_are_counted(out: Path) -> None:
    with fake_server(lambda body, number: Script(chunks=() if number % 2 else (1, 1))) as server:
        (summary,) = bench(out, "--base-url", server.url, "--num-prompts", "4")["summaries"]
    assert (summary["succeeded"], summary["source"]) == (4, "usage of each chunk")


def test_requests_in_flight_are_told_as_they_were(out: Path) -> None:
    with fake_server(Script(gap=0.05)) as server:
        (summary,) = bench(out, "--base-url", server.url, "--concurrency", "3", "--num-prompts", "12")["summaries"]
    assert 2.0 < summary["in_flight"] <= 3.0


def test_fields_and_keys_arrive(out: Path) -> None:
    with fake_server(Script()) as one, fake_server(Script()) as other:
        words = ["--endpoint", "chat", "--temperature", "0.5", "--ignore-eos", "--num-prompts", "1", "--rounds", "1"]
        keys = ["--api-key", "sk-one", "--vs-api-key=sk-two", "--extra-body", '{"top_k": 4}']
        bench(out, "--base-url", one.url + "/v1", "--vs", other.url, *words, *keys, "--vs-extra-body", '{"top_k": 5}')
    body = one.bodies[-1]
    assert body["messages"][0]["role"] == "user"
    assert (body["model"], body["temperature"], body["ignore_eos"], body["top_k"]) == ("fake-model", 0.5, True, 4)
    assert (body["max_tokens"], body["stream"]) == (4, True)
    assert other.bodies[-1]["top_k"] == 5
    assert (set(one.keys), set(other.keys)) == ({"bearer sk-one"}, {"bearer sk-two"})
    assert "sk-" not in out.read_text()


def test_prompts_can_be_token_ids(out: Path) -> None:
    with fake_server(Script()) as server:
        words = ["--tokenizer", str(ROOT / "demo/target"), "--random-input-len", "9", "--num-prompts", "2"]
        bench(out, "--base-url", server.url, *words, "--token-ids")
        bench(out, "--base-url", server.url, *words)
    ids, text = server.bodies[1]["prompt"], server.bodies[4]["prompt"]
    tokenizer = Tokenizer.load(ROOT / "demo/target")
    assert len(ids) == 9
    assert tokenizer.decode(ids) == text


def test_no_server_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--base-url", "http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no server answers at http://127.0.0.1:9" in said
    with fake_server(Script()) as server:
        assert cli.main(["bench", "--base-url", server.url, "--vs", "http://127.0.0.1:9"]) == 2
    assert "another address with --vs" in capsys.readouterr().err


def test_a_refused_first_request_is_said_before_anything_is_measured() -> None:
    with fake_server(Script(status=404)) as server, pytest.raises(ConfigError, match="http 404: no"):
        main([*QUICK, "--base-url", server.url, "--model", "unknown"])
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--concurency 4", "did you mean '--concurrency'"),
        ("--request-rate 0", "not a number of requests a second"),
        ("--goodput ttfd:3", "did you mean 'ttft'"),
        ("--goodput ttft:no", "'no' is not a number above 0"),
        ("--extra-body [1]", "is no JSON object"),
        ('--extra-body {"stream":false}', "stream is set by other flags"),
        ("--endpoint chats", "did you mean 'chat'"),
        ("--request-rate inf --duration 3", "sends without end"),
        ("--arrival burst", "give its --request-rate"),
        ("--vs-model m", "name it with --vs URL"),
        ("--vs http://x --num-prompts 3", "fewer than the 6 rounds"),
        (
            "--vs http://x --num-prompts 24 --concurrency 1 8",
            "4 requests a round are fewer than --concurrency 8; give --num",
        ),
        ("--num-prompts 3 --concurrency 4", "3 requests are fewer than --concurrency 4; give --num-prompts 4 or more"),
        ("--token-ids", "--token-ids needs --tokenizer"),
        ("--model", "expected one argument"),
    ],
)
def test_wrong_command_lines(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(line.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base-url", "localhost:8000"], "write it as http"),
        (["--base-url", "http://"], "write it as http"),
        (["--base-url", "http://x:y"], "write it as http"),
        (["--base-url", "http://127.0.0.1:99999"], "write it as http"),
        (["--output", "/nowhere/at/all.json"], "cannot write /nowhere"),
        (["--vs", "http://x", "--label", "B"], "give them two names"),
    ],
)
def test_settings_that_cannot_work(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(words)
