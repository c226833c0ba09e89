"""From a JSON object to validated fields, or one RequestError that names the field and says what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from decoding.errors import RequestError, nearest
from server.openai.fields import AcceptanceFields, PredictionFields, SpeculationFields, StreamOptions
from server.openai.responses.items import ITEM_TAGS
from server.openai.structured import JsonSchemaFields, ResponseFormat, StructuredOutputs
from server.openai.template_kwargs import TemplateKwargs
from server.openai.tools.fields import CHOICE_TAGS

# Fields without an effect on the answer: accepted, so that clients which always send them work.
IGNORED = frozenset(
    {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"}
    | {"prompt_cache_retention", "prompt_cache_options", "parallel_tool_calls", "session_id"}
)

# Fields that would change the answer and that this server does not have, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logprob_token_ids": (),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "mm_processor_kwargs": (),
    "moderation": (),
    "priority": (0,),
    "prompt_embeds": (),
    "reasoning_effort": ("none",),
    "repetition_detection": (),
    "request_id": (),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "suffix": (),
    "thinking_token_budget": (-1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}

# What to do instead, where it is not just to leave the field out.
_INSTEAD = {
    "chat_template": "templates come with the model, or by the server's --chat-template",
    "documents": "put their text into the messages",
    "function_call": "send tool_choice",
    "functions": "send tools",
    "use_beam_search": "best_of draws several answers and returns the likeliest",
}

# pydantic's error types in the words of people who write JSON; the other types keep pydantic's own
_WORDS = {
    "bool_type": "it must be true or false",
    "dict_type": "it must be an object",
    "finite_number": "it must be a finite number",
    "float_type": "it must be a number",
    "int_type": "it must be a whole number, not in quotes and without a decimal point",
    "less_than_equal": "it must be at most {le}",
    "greater_than_equal": "it must be at least {ge}",
    "list_type": "it must be an array",
    "literal_error": "it must be {expected}",
    "model_type": "it must be an object",
    "none_required": "it must be null or left out",
    "string_too_long": "it can have at most {max_length} characters",
    "string_too_short": "it must not be empty",
    "string_pattern_mismatch": "it must match {pattern}",
    "string_type": "it must be a string",
    "too_long": "it can have at most {max_length} items",
    "too_short": "it must not be empty",
}

_NESTED: dict[str, type[BaseModel]] = {
    "stream_options": StreamOptions,
    "speculation": SpeculationFields,
    "speculation.acceptance": AcceptanceFields,
    "prediction": PredictionFields,
    "response_format": ResponseFormat,
    "response_format.json_schema": JsonSchemaFields,
    "structured_outputs": StructuredOutputs,
    "chat_template_kwargs": TemplateKwargs,
}
_UNION_TAGS = frozenset({"switch", "limits"}) | CHOICE_TAGS | ITEM_TAGS
_MAX_NAME_CHARS = 60

F = TypeVar("F", bound=BaseModel)


def parse_fields(body: dict[str, Any], model: type[F]) -> F:
    """The fields of a request body.

    Raises:
        RequestError: for the first field at fault.
    """
    known: dict[str, Any] = {}
    for name, value in body.items():
        if name in model.model_fields:
            known[name] = value
        elif name not in IGNORED:
            _check_unsupported(name, value, model.model_fields)
    try:
        return model.model_validate(known)
    except ValidationError as error:
        # no input in it: it could be large, and it is the client's
        raise _request_error(error.errors(include_url=False, include_input=False, include_context=True)[0]) from None


def _check_unsupported(name: str, value: Any, valid: Iterable[str]) -> None:
    if name not in UNSUPPORTED:
        raise _unknown(name, valid)
    if value is not None and not any(
        type(value) is type(neutral) and value == neutral for neutral in UNSUPPORTED[name]
    ):
        instead = _INSTEAD.get(name, "leave it out")
        message = f"This server does not support {name}; {instead}."
        raise RequestError(message, param=name, code="unsupported_parameter")


def _unknown(name: str, valid: Iterable[str], inside: str = "") -> RequestError:
    shown = name if len(name) <= _MAX_NAME_CHARS else name[:_MAX_NAME_CHARS] + "…"
    param = f"{inside}.{shown}" if inside else shown
    return RequestError(
        f"Unknown field {param!r}: {nearest(name[:200], sorted(valid))}.", param=param, code="unknown_parameter"
    )


def _request_error(details: ErrorDetails) -> RequestError:
    place = [str(part) for part in details["loc"] if part not in _UNION_TAGS]
    param = ".".join(place)
    kind = details["type"]
    if kind == "missing":
        return RequestError(f"The field {param} is missing.", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return _unknown_nested(place)
    if kind == "literal_error" and place[-1] == "type" and "content" in place:
        message = f"{param}: this model reads text only, so it must be {details['ctx']['expected']}."
        return RequestError(message, param=param, code="unsupported_value")
    return RequestError(f"{param}: {_words(details)}.", param=param)


def _words(details: ErrorDetails) -> str:
    known = _WORDS.get(details["type"])
    return details["msg"] if known is None else known.format_map(details.get("ctx", {}))


def _unknown_nested(place: list[str]) -> RequestError:
    parent, name = ".".join(place[:-1]), place[-1]
    if parent in _NESTED:
        fields = _NESTED[parent].model_fields.items()
        return _unknown(name, [field.alias or attribute for attribute, field in fields], inside=parent)
    shown = name[:_MAX_NAME_CHARS]
    param = f"{parent}.{shown}"
    return RequestError(f"{param}: this field is not supported here.", param=param, code="unknown_parameter")
