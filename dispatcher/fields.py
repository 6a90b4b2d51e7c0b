"""The fields of a request: their names, and how a flat text or a msgpack value becomes a checked value."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgpack

from lorayard.shared.errors import Refused

MAX_REQUEST = 1 << 20
"""Most bytes of one request, names and values of all its fields together."""

REPLIES = ("stream", "list", "batch", "none")


class Kind(NamedTuple):
    """How a field is read: its text form (ValueError if malformed), the test of a value, and the value to keep."""

    expected: str
    flat: Callable[[str], Any]
    check: Callable[[Any], bool]
    make: Callable[[Any], Any]


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,20}", text, re.ASCII):
        raise ValueError
    return int(text)


def _decimal(text: str) -> float:
    if not re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?([eE][+-]?\d{1,3})?", text, re.ASCII):
        raise ValueError
    return float(text)


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError
    return text == "1"


def _clean(value: Any) -> bool:
    """Whether a text can be written as UTF-8; JSON lets lone surrogates through."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(id) is int and 0 <= id < 1 << 32 for id in value)


def _bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(id, str) and re.fullmatch(r"0|[1-9]\d{0,9}", id, re.ASCII) and _number(bias)
        for id, bias in value.items()
    )


TEXT = Kind("text", str, _clean, str)
WHOLE = Kind(
    "a whole number of 64 bits", _whole, lambda value: type(value) is int and -(1 << 63) <= value < 1 << 64, int
)
NUMBER = Kind("a number", _decimal, _number, float)
FLAG = Kind("0 or 1", _flag, lambda value: type(value) in (bool, int) and value in (0, 1), bool)
LIST = Kind("a JSON list", json.loads, lambda value: isinstance(value, list), list)
IDS = Kind("a JSON list of token ids", json.loads, _ids, tuple)
BIAS = Kind(
    'a JSON object of token ids with numbers, such as {"13": -2.5}', json.loads, _bias,
    lambda value: tuple(sorted((int(id), float(bias)) for id, bias in value.items())),
)  # fmt: skip

SAMPLING = {
    "temperature": NUMBER, "top_k": WHOLE, "top_p": NUMBER, "min_p": NUMBER, "repetition_penalty": NUMBER,
    "frequency_penalty": NUMBER, "presence_penalty": NUMBER, "seed": WHOLE, "temperature_last": FLAG,
    "min_temp": NUMBER, "max_temp": NUMBER, "temp_exponent": NUMBER, "smoothing_factor": NUMBER,
    "smoothing_curve": NUMBER, "top_a": NUMBER, "tfs": NUMBER, "typical": NUMBER, "mirostat": FLAG,
    "mirostat_tau": NUMBER, "mirostat_eta": NUMBER, "xtc_probability": NUMBER, "xtc_threshold": NUMBER,
    "xtc_ignore": IDS, "skew": NUMBER, "repetition_range": WHOLE, "repetition_decay": WHOLE, "dry_multiplier": NUMBER,
    "dry_base": NUMBER, "dry_allowed_length": WHOLE, "dry_range": WHOLE, "dry_max_ngram": WHOLE, "dry_breakers": IDS,
    "logit_bias": BIAS, "allowed_tokens": IDS, "banned_tokens": IDS,
}  # fmt: skip
"""Fields of `SamplingParams`, which checks their ranges."""

FIELDS = SAMPLING | {
    "id": TEXT, "adapter": TEXT, "adapter_digest": TEXT, "prompt": TEXT, "messages": LIST, "tokens": LIST,
    "add_bos": FLAG, "max_tokens": WHOLE, "min_tokens": WHOLE, "stop": LIST, "banned_strings": LIST, "n": WHOLE,
    "logprobs": WHOLE, "prompt_logprobs": WHOLE, "return_token_ids": FLAG, "token_healing": FLAG, "stream": FLAG,
    "reply": TEXT, "batch": TEXT, "deadline_ms": WHOLE, "ttl": WHOLE,
}  # fmt: skip
"""Every field, flat and in the payload. The payload may also have `adapters`, a list of maps."""

LATER = frozenset({
    "return_logits", "return_probs", "decode_special_tokens", "filters", "grammar", "regex", "json_schema",
    "negative_prompt", "cfg_scale", "images", "tools", "speculative", "draft_tokens", "priority",
})  # fmt: skip
"""Fields that are refused as not supported yet, so that nobody takes them for misspelled."""


def read(fields: Mapping[bytes, bytes]) -> tuple[dict[str, Any], Refused | None]:
    """Every value that can be read, flat fields over the payload's, and the first refusal."""
    refusals: list[Refused] = []
    values: dict[str, Any] = {}
    if sum(len(name) + len(value) for name, value in fields.items()) > MAX_REQUEST:
        refusals.append(Refused("too_large", f"a request has at most {MAX_REQUEST} bytes"))
        fields = {name: value for name, value in fields.items() if len(value) <= 128}  # enough to answer it
    for name, value, make in _given(fields, refusals):
        try:
            values[name] = make(name, value)
        except Refused as refusal:
            refusals.append(refusal)
        if name == "adapter":  # the two ways to name adapters replace each other
            values.pop("adapters", None)
    return values, refusals[0] if refusals else None


def _given(fields: Mapping[bytes, bytes], refusals: list[Refused]) -> Iterator[tuple[str, Any, Callable[..., Any]]]:
    """(name, value as given, function that makes it a checked value): the payload's first."""
    try:
        for name, value in _payload(fields.get(b"payload")).items():
            yield name, value, _native
    except Refused as refusal:
        refusals.append(refusal)
    for raw, text in fields.items():
        if raw != b"payload":
            yield raw.decode(errors="replace"), text, _flat


def _payload(packed: bytes | None) -> dict[str, Any]:
    if packed is None:
        return {}
    try:
        payload = msgpack.unpackb(packed, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise Refused(
            "bad_payload", f"payload is not one msgpack value: {str(error) or type(error).__name__}"
        ) from None
    if not isinstance(payload, dict) or not all(isinstance(name, str) for name in payload):
        raise Refused("bad_payload", "payload must be a msgpack map with text keys")
    return payload


def _native(name: str, value: Any) -> Any:
    if name == "adapters":
        return _pairs(value)
    kind = _kind(name)
    if not kind.check(value):
        raise Refused("bad_field", f"{name} must be {kind.expected}, not {_shown(value)}")
    return kind.make(value)


def _flat(name: str, raw: bytes) -> Any:
    if name == "adapters":
        raise Refused("bad_field", "adapters belongs into the payload; the flat field is adapter, such as sql*0.7")
    kind = _kind(name)
    try:
        value = kind.flat(raw.decode())
    except UnicodeDecodeError:
        raise Refused("bad_field", f"{name} is not UTF-8") from None
    except (ValueError, RecursionError):
        raise Refused("bad_field", f"{name} must be {kind.expected}, not {_shown(raw.decode())}") from None
    return _native(name, value)


def _kind(name: str) -> Kind:
    if name in LATER:
        raise Refused("bad_field", f"{name} is not supported yet")
    if name not in FIELDS:
        raise Refused("bad_field", f"unknown field {_shown(name)}; docs/wire.md lists the fields")
    return FIELDS[name]


def _pairs(value: Any) -> list[tuple[str, float]]:
    """`[{name, scale}]`; a scale may be absent and is then 1."""
    expected = "adapters must be a list of maps {name, scale}"
    if not isinstance(value, list):
        raise Refused("bad_adapter", f"{expected}, not {_shown(value)}")
    pairs = []
    for item in value:
        if not isinstance(item, dict) or not {"name"} <= item.keys() <= {"name", "scale"}:
            raise Refused("bad_adapter", f"{expected}, not of {_shown(item)}")
        name, scale = item["name"], item.get("scale", 1.0)
        if not _clean(name) or not _number(scale):
            raise Refused("bad_adapter", f"{expected}: name is text and scale a number, not {_shown(item)}")
        pairs.append((name, float(scale)))
    return pairs


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
