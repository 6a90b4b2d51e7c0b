"""From a row of the input to the jobs that it asks for."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorayard.shared.errors import Refused
from lorayard.shared.job import LoraSet

from . import openai
from .source import BadRow, Row
from .spec import Corpus, lora_text

PLAIN = json.JSONEncoder(separators=(",", ":"))
SORTED = json.JSONEncoder(separators=(",", ":"), sort_keys=True, default=str)
"""Made once: `json.dumps` with options makes an encoder a call."""
HOLE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
parsed = functools.lru_cache(1024)(LoraSet.parse)
AHEAD, PREFIX = 4096, 256
"""Texts that are sorted at once, by so many characters."""
SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "add_bos",
)  # fmt: skip


class Request(NamedTuple):
    """One text that is wanted. position: row * n + sample, dense. name: of the row. key: hex, the same in every run.

    fields: of the job, but for its id and where the answer goes. fault: why it cannot be sent; then fields are empty.
    """

    position: int
    name: str
    key: str
    sample: int
    columns: Mapping[str, Any]
    adapter: str
    seed: int
    fields: Mapping[str, Any]
    fault: str = ""

    @property
    def prompt(self) -> str:
        """The prompt, or chat messages as JSON, or neither."""
        return str(self.fields.get("prompt") or self.fields.get("messages") or "")


@dataclass(frozen=True)
class Maker:
    """Makes requests of rows. adapters: id -> digest, those of the yard."""

    corpus: Corpus
    adapters: Mapping[str, str]
    base: str

    def __post_init__(self) -> None:
        sample = self.corpus.sample
        static = {name: getattr(sample, name) for name in SAMPLING if getattr(sample, name) is not None}
        if sample.add_bos is not None:
            static["add_bos"] = int(sample.add_bos)
        if sample.stop:
            static["stop"] = json.dumps(sample.stop)
        object.__setattr__(self, "static", static)
        messages = [(one["role"], template(one["content"])) for one in self.corpus.messages]
        prompt = template(self.corpus.prompt) if self.corpus.prompt is not None else None
        object.__setattr__(self, "templates", (prompt, messages))

    def requests(self, row: Row) -> Iterator[Request]:
        """One for each sample; a row with a fault has requests with that fault."""
        n = self.corpus.sample.n
        try:
            if row.fault:
                raise BadRow(row.fault)
            adapter, fields = self._fields(row.columns)
            name = self._name(row)
        except (BadRow, Refused) as error:
            name = str(row.columns.get(self.corpus.input.id or "custom_id", row.position))
            for sample in range(n):
                key = _key(row.position, sample, "fault")
                yield Request(row.position * n + sample, name, key, sample, row.columns, "", 0, {}, str(error))
            return
        ids = parsed(adapter).ids
        bound = {"adapter_digest": "+".join(self.adapters[one] for one in ids)} if ids else {}
        body = SORTED.encode([name, row.columns, adapter, fields])
        for sample in range(n):
            key = _key(body, sample)  # the seed has 63 bits, because readers of JSON make a double of more
            asked = fields.get("seed")
            drawn = int(_key(self.corpus.sample.seed, key)[:16], 16) >> 1 if asked is None else asked + sample
            sent = {**self.static, **fields, **bound, "seed": drawn}  # type: ignore[attr-defined]
            yield Request(row.position * n + sample, str(name), key, sample, row.columns, adapter, drawn, sent)

    def _name(self, row: Row) -> Any:
        """What tells the row from its equals: its id, else its place."""
        column = self.corpus.input.id or ("custom_id" if openai.is_request(row.columns) else None)
        if column is None:
            return row.position
        if row.columns.get(column) in (None, ""):
            raise BadRow(f"the column {column}, its id, is empty")
        return str(row.columns[column])

    def _fields(self, columns: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """(LoRA set as text, fields of prompt, adapter and, for OpenAI's requests, sampling)."""
        if openai.is_request(columns):
            asked, fields = openai.job_fields(columns, self.base)
            adapter = asked if asked is not None else self._adapter(columns)
        else:
            adapter, fields = self._adapter(columns), self._prompt(columns)
        lora = parsed(adapter)
        unknown = [name for name in lora.ids if name not in self.adapters]
        if unknown:
            raise BadRow(f"no_adapter: the yard has no adapter {', '.join(unknown)}")
        if lora.ids:
            fields["adapter"] = str(lora)
        return str(lora), fields

    def _adapter(self, columns: Mapping[str, Any]) -> str:
        spec = self.corpus.adapter
        if spec.column is None:
            return spec.fixed
        value = columns.get(spec.column)
        found = spec.map.get(str(value)) if spec.map else value
        if found in (None, ""):
            if spec.missing == "base":
                return ""
            where = "has no entry in adapter.map" if spec.map and value else "is empty; adapter.missing may be base"
            raise BadRow(f"no_adapter: the column {spec.column} {where}")
        return lora_text(found)

    def _prompt(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        prompt, messages = self.templates  # type: ignore[attr-defined]
        if prompt is not None:
            return {"prompt": prompt(columns)}
        if messages:
            return {"messages": json.dumps([{"role": role, "content": text(columns)} for role, text in messages])}
        for name in ("prompt", "messages"):
            value = columns.get(name)
            if value:
                return {name: value if isinstance(value, str) else json.dumps(value)}
        raise BadRow("no prompt: there is neither a template nor a column prompt or messages")


def in_order(texts: Iterator[Request]) -> Iterator[Request]:
    """Those near each other sorted by adapter and beginning of the prompt, so that slots and pages serve many."""
    while ahead := list(itertools.islice(texts, AHEAD)):
        ahead.sort(key=lambda one: (one.adapter, one.prompt[:PREFIX]))
        yield from ahead


def template(text: str) -> Callable[[Mapping[str, Any]], str]:
    """A text with {column}s; {{ and }} stand for braces. Raises BadRow when it is filled with a row without one."""
    parts: list[str | tuple[str]] = []
    end = 0
    for hole in HOLE.finditer(text):
        parts.append(text[end : hole.start()])
        end = hole.end()
        parts.append((hole[1].strip(),) if hole[1] is not None else hole[0][0])
    parts.append(text[end:])

    def fill(columns: Mapping[str, Any]) -> str:
        filled = []
        for part in parts:
            if isinstance(part, tuple):
                if columns.get(part[0]) is None:
                    raise BadRow(f"the column {part[0]}, which the prompt needs, is missing or empty")
                filled.append(str(columns[part[0]]))
            else:
                filled.append(part)
        return "".join(filled)

    return fill


def _key(*parts: Any) -> str:
    return hashlib.blake2b(PLAIN.encode(parts).encode(), digest_size=16).hexdigest()
