"""Schemathesis: requests generated from /openapi.json, good and bad ones; no 5xx and nothing that is not documented."""

from __future__ import annotations

from judge import Judge, arguments, command, idle, succeeded

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def main() -> None:
    args, judge = arguments(__doc__), Judge()
    with judge("what /openapi.json promises holds for generated requests"):
        done = command(
            *("st", "run", f"{args.scripted}/openapi.json", "--url", args.scripted, "--no-color"),
            *("--header", f"Authorization: Bearer {args.key}", "--checks", ",".join(CHECKS)),
            *("--max-examples", "30", "--seed", "1", "--request-timeout", "30", "--continue-on-failure"),
            *("--phases", "examples,coverage,fuzzing", "--report", "junit", "--report-dir", str(args.out)),
            seconds=540,
            folder=args.out,  # where it leaves its caches
        )
        succeeded(done)
    with judge("the server is idle afterwards"):
        assert idle(args.scripted, args.key)
    judge.end()


if __name__ == "__main__":
    main()
