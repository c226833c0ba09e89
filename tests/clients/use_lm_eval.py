"""lm-evaluation-harness: its numbers over HTTP are those that it gets from transformers on the same model, in float32.

Every kind of request is compared, on local documents (tasks/): multiple choice, loglikelihood, rolling loglikelihood
and generation; not the metrics alone but each document's answers. What must be set for both sides to ask the same:

- ``local-completions`` takes ``max_length`` for the server's context and keeps two tokens of it free (one is generated,
  one is the window's first); ``hf`` keeps none. So ``hf`` gets two fewer.
- Generation keeps one token free, so that no context here is as long as to be cut.
- Prompts go out as token ids. As strings, a context and its continuation would be tokenized together, and a token can
  reach over their border; only generation, which has no such border, is compared with strings as well.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from judge import CONTEXT, MODEL, TARGET, Judge, arguments
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).with_name("tasks")
SCORED = ("saccade_choice", "saccade_loglikelihood", "saccade_rolling")
GENERATED = ("saccade_generation",)
SHORT_CONTEXT = 256  # many documents are longer: their contexts are cut, and they are scored window by window
PLACES = 5e-5  # half of the fourth decimal
RESERVED = 2

Results = dict[str, Any]


def evaluate(model: str, options: dict[str, Any], tasks: tuple[str, ...]) -> Results:
    """lm_eval's results, with each document's answers."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    batch = options.pop("batch_size", 1)
    found = simple_evaluate(
        model=model,
        model_args=options,
        tasks=list(tasks),
        task_manager=manager,
        batch_size=batch,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    return found


def over_http(args: Namespace, tasks: tuple[str, ...], context: int = CONTEXT, **options: Any) -> Results:
    given = {
        "model": MODEL,
        "base_url": f"{args.exact}/v1/completions",
        "tokenizer": str(TARGET),
        "tokenizer_backend": "huggingface",
        "max_length": context,
        "max_retries": 1,
        "header": {"Authorization": f"Bearer {args.key}"},
        **options,
    }
    return evaluate("local-completions", given, tasks)


def with_transformers(tasks: tuple[str, ...], context: int = CONTEXT) -> Results:
    options = {"pretrained": str(TARGET), "dtype": "float32", "device": "cpu", "max_length": context - RESERVED}
    return evaluate("hf", options, tasks)


def compare(name: str, found: Results, expected: Results) -> None:
    """Refuse numbers that differ within four decimals, of metrics and of every document's answers."""
    farthest = 0.0
    for task, metrics in expected["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                other = found["results"][task][metric]
                print(f"{name}: {task} {metric} {other:.6f} {value:.6f}")
                # a perplexity over the words of code is in the thousands: its first digits are what float32 holds
                assert abs(other - value) <= PLACES * max(1.0, abs(value)), (task, metric, other, value)
        for mine, theirs in zip(found["samples"][task], expected["samples"][task], strict=True):
            assert mine["doc_id"] == theirs["doc_id"]
            farthest = max(farthest, distance(mine["resps"], theirs["resps"]))
    print(f"{name}: log-likelihoods of documents differ by {farthest:.2e} at most")
    assert farthest <= 1e-3, farthest  # nats, in sums over up to a thousand tokens


def distance(mine: Any, theirs: Any) -> float:
    """How far numbers are apart; anything else must be equal."""
    if isinstance(theirs, list | tuple):
        return max(distance(one, other) for one, other in zip(mine, theirs, strict=True))
    if isinstance(theirs, float):
        return abs(mine - theirs)
    assert mine == theirs, (mine, theirs)
    return 0.0


def main() -> None:
    args, judge = arguments(__doc__), Judge()
    with judge("set up: transformers' own numbers"):
        expected = with_transformers(SCORED + GENERATED)
        short = with_transformers(SCORED, SHORT_CONTEXT)
    for name, options in (
        ("one prompt a request", {}),
        ("eight prompts a request", {"batch_size": 8}),
        ("eight requests at once", {"num_concurrent": 8}),
    ):
        with judge(f"all kinds equal transformers, {name}"):
            compare(name, over_http(args, SCORED + GENERATED, **options), expected)
    with judge("contexts cut and windows rolled equal transformers"):
        compare("short context", over_http(args, SCORED, SHORT_CONTEXT), short)
    with judge("generation from strings equals transformers"):
        strings = over_http(args, GENERATED, tokenized_requests=False)
        compare("strings", strings, {**expected, "results": {GENERATED[0]: expected["results"][GENERATED[0]]}})
    judge.end()


if __name__ == "__main__":
    main()
