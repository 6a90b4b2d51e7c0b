"""Where chat templates are found, and which of several is used: transformers' rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorayard.shared.errors import ModelError, Refused

from .special import read_json
from .template import MAX_SOURCE, ChatTemplate
from .trial import checked_template

DEFAULT, WITH_TOOLS = "default", "tool_use"
"""Names of the template in general, and of the one for messages that come with tools."""


def read_templates(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> dict[str, ChatTemplate]:
    """The folder's templates by name, those that have no use left out. Raises ModelError."""
    sources = _from_files(folder) or _named(folder / "tokenizer_config.json", config.get("chat_template"))
    if not sources:
        file = folder / "chat_template.json"
        sources = _named(file, read_json(file).get("chat_template"))
    if sources and not sources.keys() & {DEFAULT, WITH_TOOLS}:
        raise ModelError(f"{folder}: none of the chat templates {sorted(sources)} is named {DEFAULT} or {WITH_TOOLS}")
    return {name: checked_template(sources[name], special_tokens) for name in (DEFAULT, WITH_TOOLS) if name in sources}


def choose(templates: Mapping[str, ChatTemplate], with_tools: bool) -> ChatTemplate:
    """The template for a request. Raises Refused."""
    template = templates.get(WITH_TOOLS if with_tools and WITH_TOOLS in templates else DEFAULT)
    if template is not None:
        return template
    if templates:
        raise Refused("bad_field", "messages: the model's only chat template is for requests with tools")
    raise Refused("bad_field", "messages: the model has no chat template; send a prompt")


def _from_files(folder: Path) -> dict[str, str]:
    """chat_template.jinja and additional_chat_templates/NAME.jinja."""
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return {name: _read(file) for name, file in files.items() if file.is_file()}


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(MAX_SOURCE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None


def _named(file: Path, value: Any) -> dict[str, str]:
    """The field chat_template of a JSON file: one text, or a list of maps with name and template."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    sources = value if isinstance(value, dict) else {} if value is None else {DEFAULT: value}
    for name, source in sources.items():
        if not isinstance(name, str) or not isinstance(source, str):
            raise ModelError(f"{file}: chat_template must be text, or a list of maps with name and template")
    return sources
