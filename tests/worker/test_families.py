"""Chat templates in the styles of the public families: each over many conversations, equal to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from lorayard.demo import BASE
from lorayard.shared.errors import Refused
from lorayard.worker import Tokenizer
from lorayard.worker.text.template import ChatTemplate

FAMILIES = {file.stem: file for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SYSTEM, USER, ANSWER = (
    says("system", "  Be brief.\n"),
    says("user", "What is len? 'é' \"q\"\n"),
    says("assistant", " A. "),
)
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "sum", "arguments": {"b": [1.5, None], "a": "ü<&>"}},
}
CALLS = says("assistant", None, tool_calls=[CALL])
RESULT = says("tool", "42", tool_call_id="abcdefghi", name="sum")
PARTS = [{"type": "text", "text": " Look: "}, {"type": "image"}, {"type": "text", "text": "what?"}]
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, USER, ANSWER, USER],
    "all": [SYSTEM, USER, ANSWER, USER, ANSWER],
    "unicode": [says("user", "👩‍👩‍👧 日本語 \u202e\u0000 \r\n\r\n {{ x }} {% y %}"), says("assistant", "İ ß ﬁ"), USER],
    "empty": [says("system", ""), says("user", ""), says("assistant", ""), says("user", " ")],
    "marks": [says("user", "<|begin|>[INST]<|im_end|></s>"), says("assistant", "<think>\na\n</think>\n\nb"), USER],
    "thinking": [USER, says("assistant", "So.", reasoning="Hm.\n"), USER,
                 says("assistant", "Yes.", reasoning_content="\nOh")],
    "call": [SYSTEM, USER, CALLS, RESULT],
    "calls": [USER, says("assistant", "I look.", tool_calls=[CALL, CALL]), RESULT, RESULT, ANSWER, USER],
    "bad id": [USER, says("assistant", None, tool_calls=[CALL | {"id": "x"}]),
               says("tool", "1", tool_call_id="y"), USER],
    "parts": [says("system", PARTS[:1]), says("user", PARTS), ANSWER],
    "wrong order": [ANSWER, USER, USER],
    "strange role": [USER, says("comment", "aside"), says("narrator", "stop here")],
    "system later": [USER, ANSWER, SYSTEM, USER],
}  # fmt: skip
PROPERTIES = {
    "a": {"type": "string", "description": 'a "word"'}, "b": {"type": "array", "items": {"type": "number"}},
    "c": {"type": ["integer", "boolean"]}, "d": {"type": "string", "enum": ["x", "y"]},
}  # fmt: skip
SUM = {"name": "sum", "description": "Adds.", "return": {"type": "number"},
       "parameters": {"type": "object", "properties": PROPERTIES, "required": ["a"]}}  # fmt: skip
NOW = {"name": "now", "description": "Tells the time.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": SUM}, {"type": "function", "function": NOW}]


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(BASE)


def rendered(reference: PreTrainedTokenizerFast, source: str, talk: list[Any], **given: Any) -> tuple[str, str]:
    """("text", what transformers renders) or ("error", the template's own words, "" if it failed otherwise)."""
    try:
        text: str = reference.apply_chat_template(talk, chat_template=source, tokenize=False, **given)
        return "text", text
    except TemplateError as error:
        return "error", str(error) if type(error) is TemplateError else ""
    except (TypeError, ValueError, AttributeError, KeyError):
        return "error", ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_renders_as_in_transformers(reference: PreTrainedTokenizerFast, family: str) -> None:
    source = FAMILIES[family].read_text()
    template = ChatTemplate(source, TOKENS)
    texts = 0
    for name, talk in TALKS.items():
        for prompt in (True, False):
            for tools in (None, TOOLS):
                kind, expected = rendered(reference, source, talk, tools=tools, add_generation_prompt=prompt)
                case = f"{family}, {name}, prompt {prompt}, tools {tools is not None}"
                if kind == "text":
                    texts += 1
                    assert template.render(talk, prompt, tools) == expected, case
                else:
                    with pytest.raises(Refused) as refused:
                        template.render(talk, prompt, tools)
                    assert refused.value.code == "bad_field" and str(refused.value).endswith(expected), case
    assert texts >= 12


def test_there_are_many_families() -> None:
    assert len(FAMILIES) >= 34


def write(folder: Path, config: dict[str, Any], **files: str) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((BASE / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    (folder / "config.json").write_text("{}")
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_jinja", ".jinja").replace("_json", ".json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return folder


NAMED = [
    {"name": "default", "template": "plain"},
    {"name": "tool_use", "template": "tools"},
    {"name": "rag", "template": "{%"},
]
PLACES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "config": ({"chat_template": "config"}, {}),
    "named": ({"chat_template": NAMED}, {}),
    "file over config": ({"chat_template": "config"}, {"chat_template_jinja": "file\n"}),
    "file over names": ({"chat_template": NAMED}, {"chat_template_jinja": "file"}),
    "folder": ({}, {"chat_template_jinja": "file", "additional_chat_templates__tool_use_jinja": "more"}),
    "folder over config": ({"chat_template": "config"}, {"additional_chat_templates__default_jinja": "more"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_template_is_found_where_transformers_finds_it(tmp_path: Path, place: str) -> None:
    config, files = PLACES[place]
    folder = write(tmp_path / "model", config, **files)
    tokenizer, reference = Tokenizer.from_directory(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for tools in (None, TOOLS):
        expected = reference.apply_chat_template([USER], tools=tools, tokenize=False)
        assert tokenizer.render([USER], False, tools) == expected


def test_the_template_of_a_processor_is_the_last_resort(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {}, chat_template_json='{"chat_template": "processor"}')
    assert Tokenizer.from_directory(folder).render([USER]) == "processor"
    folder = write(tmp_path / "b", {"chat_template": "config"}, chat_template_json='{"chat_template": "processor"}')
    assert Tokenizer.from_directory(folder).render([USER]) == "config"


def test_a_template_for_tools_only(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write(tmp_path / "model", {"chat_template": NAMED[1:]}))
    assert tokenizer.render([USER], tools=TOOLS) == "tools"
    with pytest.raises(Refused, match="only chat template is for requests with tools"):
        tokenizer.render([USER])
