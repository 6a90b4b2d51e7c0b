"""OpenAI's batch files: a request a line (`custom_id`, `method`, `url`, `body`), an answer a line.

Format: OpenAI's Batch API, chat completions and completions. One extension: `body.adapters`, a list of name and scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .source import BadRow
from .spec import lora_text

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAME = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "max_tokens", "top_k", "min_p")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "stream": (False,), "logprobs": (False, None), "user": (), "metadata": (), "store": (False,),
    "response_format": ({"type": "text"},), "logit_bias": ({},), "tools": ([],), "service_tier": (), "echo": (False,),
    "best_of": (1,), "suffix": (None, ""), "parallel_tool_calls": (), "top_logprobs": (None, 0),
}  # fmt: skip
"""Fields that change nothing, or nothing with these values; an empty list of values means any."""


def is_request(columns: Mapping[str, Any]) -> bool:
    """Whether a row is a request of a batch file."""
    return "custom_id" in columns and "body" in columns


def job_fields(columns: Mapping[str, Any], base: str) -> tuple[str | None, dict[str, Any]]:
    """(LoRA set, None: the corpus' own; fields of the job). `base`: the name that means no adapter.

    Raises BadRow naming what is not done.
    """
    body, url = columns["body"], columns.get("url")
    if url not in (CHAT, COMPLETIONS) or columns.get("method", "POST") != "POST" or not isinstance(body, dict):
        raise BadRow(f"a request must be a POST to {CHAT} or {COMPLETIONS} with a body")
    rest = dict(body)
    asked, named = rest.pop("adapters", None), rest.pop("model", None)
    fields = {"messages": json.dumps(rest.pop("messages", []))} if url == CHAT else _prompt(rest.pop("prompt", None))
    if (most := rest.pop("max_completion_tokens", None)) is not None:
        fields["max_tokens"] = most
    if (stop := rest.pop("stop", None)) not in (None, []):
        fields["stop"] = json.dumps([stop] if isinstance(stop, str) else stop)
    for name, value in rest.items():
        if name in SAME:
            if value is not None:
                fields[name] = value
        elif name not in NEUTRAL or (NEUTRAL[name] and value not in NEUTRAL[name]):
            raise BadRow(f"bad_field: body.{name} is not supported")
    if asked is not None:
        return lora_text(asked), fields
    return (None if named in (None, base) else str(named)), fields


def _prompt(prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
        return {"tokens": json.dumps(prompt)}
    raise BadRow("body.prompt must be one text or a list of token ids")


def answer(row: Mapping[str, Any], url: str) -> dict[str, Any]:
    """A line of an output file, from a row of a shard."""
    tokens = {"prompt_tokens": row["prompt_tokens"], "completion_tokens": row["new_tokens"]}
    choice: dict[str, Any] = {"index": 0, "finish_reason": row["finish_reason"], "logprobs": None}
    if url == CHAT:
        choice["message"] = {"role": "assistant", "content": row["text"], "refusal": None}
    else:
        choice["text"] = row["text"]
    body = {
        "id": f"cmpl-{row['row_key']}", "object": "chat.completion" if url == CHAT else "text_completion", "created": 0,
        "model": row["adapter"] or "base", "choices": [choice],
        "usage": {**tokens, "total_tokens": row["prompt_tokens"] + row["new_tokens"]},
    }  # fmt: skip
    response = {"status_code": 200, "request_id": row["row_key"], "body": body}
    return {"id": f"batch_req_{row['row_key']}", "custom_id": row["custom_id"], "response": response, "error": None}


def failure(key: str, custom_id: str, code: str, reason: str) -> dict[str, Any]:
    """A line for a request that failed."""
    error = {"code": code, "message": reason}
    return {"id": f"batch_req_{key}", "custom_id": custom_id, "response": None, "error": error}
