"""What a corpus is: a job file or flags with every key checked, and the fingerprint that its folder belongs to."""

from __future__ import annotations

import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from lorayard.shared.errors import Refused, UsageError
from lorayard.shared.job import LoraSet
from lorayard.shared.keys import CLASSES

FORMATS = ("auto", "jsonl", "csv", "parquet", "openai")
SHARD_FORMATS = ("parquet", "jsonl")


@dataclass(frozen=True)
class Input:
    """path: file, glob or URL that fsspec opens, or `-` for standard input. id: column that names a row."""

    path: str
    format: str = "auto"
    id: str | None = None


@dataclass(frozen=True)
class Adapter:
    """The LoRA set of a row: `fixed`, or what its `column` says, through `map` if there is one.

    missing: what to do with an empty or unmapped value: `fail` the row, or run the `base`.
    """

    fixed: str = ""
    column: str | None = None
    map: Mapping[str, Any] = field(default_factory=dict)
    missing: str = "fail"


@dataclass(frozen=True)
class Sample:
    """How texts are drawn; see docs/wire.md. n: samples of each row. seed: of the corpus; every sample has its own."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: list[Any] = field(default_factory=list)
    add_bos: bool | None = None
    n: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Accept:
    """Which texts count; the others are kept apart with the reason. regex: must be found in the text."""

    min_chars: int | None = None
    max_chars: int | None = None
    min_tokens: int | None = None
    regex: str | None = None
    json_schema: Any = None
    finish: str | None = None


@dataclass(frozen=True)
class Output:
    """Shards of at most so many rows; what has come is written after flush_s at the latest."""

    format: str = "parquet"
    shard_rows: int = 10_000
    flush_s: float = 30.0


@dataclass(frozen=True)
class Run:
    """How jobs go to the yard. window: most under way at once. ttl: seconds that Redis keeps what is not read."""

    cls: str = "batch"
    window: int = 2048
    ttl: int = 3600


@dataclass(frozen=True)
class Corpus:
    """One corpus. prompt: a text with {column}s; messages: chat messages with such texts; neither: the row's own."""

    input: Input
    prompt: str | None = None
    messages: list[Any] = field(default_factory=list)
    adapter: Adapter = field(default_factory=Adapter)
    sample: Sample = field(default_factory=Sample)
    accept: Accept = field(default_factory=Accept)
    output: Output = field(default_factory=Output)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        if self.prompt is not None and self.messages:
            raise UsageError("prompt and messages exclude each other")
        if self.adapter.fixed and self.adapter.column:
            raise UsageError("adapter.fixed and adapter.column exclude each other")
        self._check_choices()
        try:
            for text in (self.adapter.fixed, *self.adapter.map.values()):
                LoraSet.parse(lora_text(text))
            re.compile(self.accept.regex or "")
        except (Refused, re.error) as error:
            raise UsageError(str(error)) from None

    def _check_choices(self) -> None:
        for message in self.messages:
            if not isinstance(message, dict) or message.keys() != {"role", "content"}:
                raise UsageError("messages: each is a map of role and content")
        for name, value, allowed in (
            ("input.format", self.input.format, FORMATS), ("output.format", self.output.format, SHARD_FORMATS),
            ("run.cls", self.run.cls, CLASSES), ("adapter.missing", self.adapter.missing, ("fail", "base")),
            ("accept.finish", self.accept.finish, (None, "stop", "length")),
        ):  # fmt: skip
            if value not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        for name, number, low, high in (
            ("sample.n", self.sample.n, 1, 1000), ("output.shard_rows", self.output.shard_rows, 1, 1_000_000),
            ("run.window", self.run.window, 1, 100_000), ("output.flush_s", self.output.flush_s, 0.1, 86_400),
            ("run.ttl", self.run.ttl, 60, 2_592_000), ("sample.seed", self.sample.seed, 0, (1 << 64) - 1),
        ):  # fmt: skip
            if not low <= number <= high:
                raise UsageError(f"{name} must be between {low} and {high}, not {number}")

    def fingerprint(self, base_digest: str) -> str:
        """Digest of what decides the texts: base, prompt, adapters, sampling, gates. The adapters' bytes are kept
        in the ledger as they are met."""
        decisive = asdict(self)
        for name in ("output", "run"):
            del decisive[name]
        decisive["input"] = {"id": self.input.id}
        body = json.dumps([decisive, base_digest], sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(body.encode(), digest_size=16).hexdigest()


def lora_text(value: Any) -> str:
    """`sql*0.7+pirate` of that text, or of [{name: sql, scale: 0.7}, {name: pirate}]. Raises UsageError."""
    if isinstance(value, str):
        return value
    try:
        return str(LoraSet.of([(one["name"], float(one.get("scale", 1))) for one in value]))
    except (TypeError, KeyError, AttributeError, ValueError):
        raise UsageError(
            f"an adapter must be a text such as sql*0.7+pirate or a list of name and scale, not {value!r}"
        ) from None


def from_file(path: Path) -> Corpus:
    """Read a YAML job file; input paths in it are relative to it. Raises UsageError naming the key."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    corpus: Corpus = build(Corpus, data, str(path))
    return replace(corpus, input=replace(corpus.input, path=absolute(corpus.input.path, path.parent)))


def absolute(path: str, base: Path) -> str:
    """A local path as seen from `base`; a URL, and `-` for standard input, as they are."""
    return path if path == "-" or "://" in path else str(base.absolute() / path)


def build(kind: type, data: Any, where: str) -> Any:
    """A dataclass from a map, every key known and of its type. Raises UsageError naming the key."""
    if not isinstance(data, dict):
        raise UsageError(f"{where} must be a map, not {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    known = {one.name: one for one in fields(kind)}
    for key in data:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}; there are {', '.join(known)}")
    for name, one in known.items():
        if name not in data and one.default is MISSING and one.default_factory is MISSING:
            raise UsageError(f"{where}: {name} is missing")
    return kind(**{key: _typed(hints[key], value, f"{where}: {key}") for key, value in data.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        if hint in (Input, Adapter) and isinstance(value, str):
            return hint(value)
        return build(typing.cast(type, hint), value, where)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(one) or one for one in options)
    if Any in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    plain = {Mapping: dict}
    if type(value) not in [plain.get(kind, kind) for kind in kinds]:
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UsageError(f"{where} must be {names}, not {value!r}"[:300])
    return value
