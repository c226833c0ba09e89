"""What a text must be to satisfy a schema: the jsonschema library's word, on numbers as they are written."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from jsonschema.validators import Draft202012Validator, validator_for


def exact(text: str) -> Any:
    """JSON with decimal numbers: in binary ones, 0.07 is no multiple of 0.01.

    Raises:
        ValueError: it is not valid JSON.
    """
    return json.loads(text, parse_float=Decimal, parse_constant=_refused)


def complaint(text: str, schema: Any) -> str | None:
    """Why a text does not satisfy a schema; None: it does."""
    try:
        value = exact(text)
    except ValueError as error:
        return f"{error}: {text!r}"
    text.encode()  # no lone surrogates
    schema = exact(json.dumps(schema))
    kind = validator_for(schema, default=Draft202012Validator)
    errors = [error.message for error in kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(value)]
    return f"{errors[0][:300]}: {text!r}" if errors else None


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
