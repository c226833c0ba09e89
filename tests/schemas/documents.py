"""Level 6: what people ask for. Calls, records, configurations, reports, all of them bounded."""

from __future__ import annotations

from collections.abc import Iterator

from tests.schemas.case import BOOL, DIGIT, NULL, WORD, Case, Schema, array, closed, one_of, pattern, ref, text, whole

DATE: Schema = {"type": "string", "format": "date"}
CENTS: Schema = {"type": "number", "minimum": 0, "maximum": 999, "multipleOf": 0.01}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01}
NAME = pattern("^[A-Z][a-z]{1,9}( [A-Z][a-z]{1,9})?$")
URL = pattern(r"^https://[a-z]{2,8}\.(com|org|net)(/[a-z0-9]{1,6}){0,2}$")
PATH = pattern(r"^([a-z_]{1,8}/){0,2}[a-z_]{1,8}\.(py|md|toml)$")

CALLS: dict[str, Schema] = {
    "weather": closed({"city": NAME, "unit": one_of("celsius", "fahrenheit"), "days": whole(1, 7)}, ("days",)),
    "search": closed({"query": text(24, 2), "limit": whole(1, 50), "safe": BOOL}, ("limit", "safe")),
    "mail": closed({"to": array(pattern("^[a-z]{2,8}@example\\.org$"), 2, 1), "subject": text(20), "body": text(40)}),
    "move": closed({"piece": one_of("K", "Q", "R", "B", "N", "P"), "to": pattern("^[a-h][1-8]$"), "check": BOOL}),
    "shell": closed(
        {"command": one_of("ls", "cat", "grep", "find"), "arguments": array(text(10, 1), 3), "sudo": {"const": False}}
    ),
    "edit": closed({"file": PATH, "line": whole(1, 999), "old": text(20), "new": text(20)}),
    "timer": closed({"seconds": whole(1, 3600), "label": {"type": ["string", "null"], "maxLength": 12}}),
    "one of several": {
        "anyOf": [
            closed({"name": {"const": "read"}, "arguments": closed({"path": PATH})}),
            closed({"name": {"const": "write"}, "arguments": closed({"path": PATH, "text": text(24)})}),
            closed({"name": {"const": "stop"}, "arguments": closed({})}),
        ]
    },
    "several at once": array(
        closed({"name": one_of("add", "mul"), "arguments": closed({"a": DIGIT, "b": DIGIT})}), 3, 1
    ),
}

RECORDS: dict[str, Schema] = {
    "person": closed({"name": NAME, "born": DATE, "email": pattern("^[a-z]{2,8}@[a-z]{2,8}\\.org$"), "married": BOOL}),
    "address": closed({"street": text(20, 3), "number": whole(1, 300), "zip": pattern("^[0-9]{5}$"), "city": NAME}),
    "book": closed(
        {
            "title": text(24, 1),
            "authors": array(NAME, 2, 1),
            "year": whole(1450, 2030),
            "isbn": pattern("^97[89]-[0-9]{10}$"),
        }
    ),
    "commit": closed(
        {"hash": pattern("^[0-9a-f]{7}$"), "author": NAME, "message": text(30, 5), "files": array(PATH, 3)}
    ),
    "log line": closed(
        {
            "time": pattern("^2[0-9]{3}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z$"),
            "level": one_of("DEBUG", "INFO", "WARNING", "ERROR"),
            "message": text(30),
            "code": {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
        }
    ),
    "HTTP request": closed(
        {
            "method": one_of("GET", "POST", "PUT", "DELETE"),
            "url": URL,
            "status": one_of(200, 201, 301, 400, 404, 500),
            "headers": {
                "type": "object",
                "patternProperties": {"^x-[a-z]{1,6}$": text(8)},
                "additionalProperties": False,
                "maxProperties": 2,
            },
        }
    ),
    "measurement": closed({"sensor": pattern("^s[0-9]{3}$"), "values": array(SHARE, 5, 3), "valid": BOOL}),
    "song": closed({"title": text(18, 1), "seconds": whole(30, 600), "genre": one_of("rock", "jazz", "folk", "pop")}),
    "ticket": closed(
        {
            "id": pattern("^[A-Z]{2,4}-[0-9]{1,4}$"),
            "title": text(24, 4),
            "priority": one_of("low", "medium", "high", "urgent"),
            "labels": array(one_of("bug", "feature", "docs", "question"), 3),
            "assignee": {"anyOf": [WORD, NULL]},
            "open": BOOL,
        }
    ),
    "user of a service": closed(
        {
            "id": {"type": "string", "format": "uuid"},
            "name": pattern("^[a-z][a-z0-9_]{2,11}$"),
            "roles": array(one_of("admin", "editor", "viewer"), 2, 1),
            "settings": closed(
                {"theme": one_of("dark", "light"), "mails": BOOL, "page": whole(10, 100, multipleOf=10)}
            ),
        }
    ),
}

DOCUMENTS: dict[str, Schema] = {
    "invoice": closed(
        {
            "number": pattern("^20[0-9]{2}-[0-9]{4}$"),
            "date": DATE,
            "customer": closed({"name": NAME, "zip": pattern("^[0-9]{5}$")}),
            "items": array(closed({"what": text(14, 2), "count": whole(1, 20), "price": CENTS}), 3, 1),
            "paid": BOOL,
        }
    ),
    "recipe": closed(
        {
            "name": text(20, 3),
            "serves": whole(1, 12),
            "ingredients": array(
                closed({"what": WORD, "amount": whole(1, 500), "unit": one_of("g", "ml", "pcs")}), 4, 2
            ),
            "steps": array(text(24, 4), 3, 1),
        }
    ),
    "calendar": closed(
        {
            "events": array(
                closed(
                    {
                        "title": text(16, 1),
                        "day": DATE,
                        "from": pattern("^([01][0-9]|2[0-3]):[0-5][0-9]$"),
                        "repeat": one_of("never", "daily", "weekly"),
                    },
                    ("repeat",),
                ),
                3,
                1,
            )
        }
    ),
    "package": closed(
        {
            "name": pattern("^[a-z][a-z-]{1,12}$"),
            "version": pattern(r"^[0-9]\.[0-9]{1,2}\.[0-9]{1,2}$"),
            "private": {"const": True},
            "dependencies": {
                "type": "object",
                "patternProperties": {"^[a-z]{2,8}$": pattern(r"^\^?[0-9]\.[0-9]$")},
                "additionalProperties": False,
                "maxProperties": 3,
            },
            "scripts": closed({"build": text(16), "test": text(16)}, ("build",)),
        }
    ),
    "form": closed(
        {
            "fields": array(
                {
                    "anyOf": [
                        closed({"type": {"const": "text"}, "label": text(12, 1), "most": whole(1, 99)}),
                        closed({"type": {"const": "check"}, "label": text(12, 1), "on": BOOL}),
                        closed({"type": {"const": "select"}, "options": array(WORD, 3, 2)}),
                    ]
                },
                3,
                1,
            )
        }
    ),
    "review": closed(
        {
            "stars": whole(1, 5),
            "summary": text(30, 5),
            "good": array(text(14, 2), 2),
            "bad": array(text(14, 2), 2),
            "again": BOOL,
        }
    ),
    "steps of reasoning": closed(
        {
            "steps": array(closed({"explanation": text(30, 3), "output": text(14, 1)}), 3, 1),
            "final_answer": text(16, 1),
        }
    ),
    "extraction": closed(
        {
            "people": array(NAME, 2),
            "places": array(NAME, 2),
            "dates": array(DATE, 2),
            "sentiment": one_of("positive", "neutral", "negative"),
            "confidence": SHARE,
        }
    ),
    "syntax tree": {
        **closed({"body": array(ref("statement"), 2, 1)}),
        "$defs": {
            "statement": {"anyOf": [ref("assign"), ref("return")]},
            "assign": closed({"kind": {"const": "assign"}, "name": WORD, "value": ref("value")}),
            "return": closed({"kind": {"const": "return"}, "value": ref("value")}),
            "value": {"anyOf": [DIGIT, BOOL, closed({"name": WORD})]},
        },
    },
    "places on a map": closed(
        {
            "type": {"const": "FeatureCollection"},
            "features": array(
                closed(
                    {
                        "type": {"const": "Feature"},
                        "geometry": closed(
                            {
                                "type": {"const": "Point"},
                                "coordinates": {
                                    "type": "array",
                                    "prefixItems": [whole(-180, 180), whole(-90, 90)],
                                    "items": False,
                                    "minItems": 2,
                                },
                            }
                        ),
                        "properties": closed({"name": NAME}),
                    }
                ),
                2,
                1,
            ),
        }
    ),
    "report of tests": closed(
        {
            "suite": WORD,
            "passed": whole(0, 99),
            "failed": whole(0, 9),
            "cases": array(closed({"name": pattern("^test_[a-z]{2,8}$"), "ok": BOOL, "ms": whole(0, 999)}), 3, 2),
        }
    ),
    "board of a game": closed(
        {
            "board": array(array(one_of("x", "o", " "), 3, 3), 3, 3),
            "turn": one_of("x", "o"),
            "winner": one_of("x", "o", None),
        }
    ),
    "workflow": closed(
        {
            "on": array(one_of("push", "pull_request"), 2, 1),
            "jobs": {
                "type": "object",
                "patternProperties": {
                    "^[a-z]{2,6}$": closed(
                        {
                            "runs-on": one_of("ubuntu-latest", "macos-latest"),
                            "steps": array(closed({"run": text(18, 2)}), 2, 1),
                        }
                    )
                },
                "additionalProperties": False,
                "maxProperties": 2,
            },
        }
    ),
    "table": closed(
        {
            "columns": {"const": ["id", "name", "score"]},
            "rows": array(
                {"type": "array", "prefixItems": [whole(1, 99), WORD, SHARE], "items": False, "minItems": 3}, 3, 2
            ),
        }
    ),
    "two languages": closed({"Frage": text(20, 3), "Antwort": text(20, 3), "質問": text(12), "答え": text(12)}),
    "settings": closed(
        {
            f"{group}": closed({"enabled": BOOL, "level": whole(0, 5), "name": one_of("low", "mid", "high")})
            for group in ("audio", "video", "network", "power")
        }
    ),
    "diff": closed(
        {
            "file": PATH,
            "hunks": array(
                closed({"line": whole(1, 500), "removed": array(text(14), 2), "added": array(text(14), 2)}), 2, 1
            ),
        }
    ),
    "poll": closed({"question": text(30, 5), "options": array(text(12, 1), 4, 2), "votes": array(whole(0, 500), 4, 2)}),
}


def cases() -> Iterator[Case]:
    for name, schema in CALLS.items():
        yield Case(f"call/{name}", 6, schema)
    for name, schema in RECORDS.items():
        yield Case(f"record/{name}", 6, schema)
    for name, schema in DOCUMENTS.items():
        yield Case(f"document/{name}", 6, schema)
