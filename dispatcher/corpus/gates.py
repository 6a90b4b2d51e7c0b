"""Which texts count. A gate looks at one text alone, so what it says does not depend on the order of answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from lorayard.shared.errors import UsageError

from .spec import Accept

Gate = Callable[[Mapping[str, Any]], bool]


def gates(accept: Accept) -> dict[str, Gate]:
    """Name -> a check of a text's row, True if it passes; in the order in which they are asked."""
    made: dict[str, Gate] = {}
    if accept.finish is not None:
        made["finish"] = lambda row: bool(row["finish_reason"] == accept.finish)
    if (fewest := accept.min_chars) is not None:
        made["min_chars"] = lambda row: len(row["text"]) >= fewest
    if (most := accept.max_chars) is not None:
        made["max_chars"] = lambda row: len(row["text"]) <= most
    if (tokens := accept.min_tokens) is not None:
        made["min_tokens"] = lambda row: bool(row["new_tokens"] >= tokens)
    if accept.regex is not None:
        pattern = re.compile(accept.regex)
        made["regex"] = lambda row: pattern.search(row["text"]) is not None
    if accept.json_schema is not None:
        made["json_schema"] = _json_gate(accept.json_schema)
    return made


def _json_gate(schema: Any) -> Gate:
    """Whether the text is JSON that fits a schema (JSON Schema, draft 2020-12 unless it names another)."""
    import jsonschema

    if isinstance(schema, str):
        try:
            with open(schema) as file:
                schema = json.load(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"accept.json_schema: {schema} cannot be read: {error}") from None
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UsageError(f"accept.json_schema is no JSON schema: {error.message}") from None
    validator = kind(schema)

    def fits(row: Mapping[str, Any]) -> bool:
        try:
            return bool(validator.is_valid(json.loads(row["text"])))
        except (ValueError, RecursionError):
            return False

    return fits
