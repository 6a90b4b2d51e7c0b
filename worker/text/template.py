"""Chat templates: a Jinja template of the model's folder turns messages into the prompt that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from lorayard.shared.errors import ModelError, Refused

from .budget import OverBudget, TemplateFault
from .expressions import SELECTORS
from .filters import FILTERS, TESTS
from .interpreter import Interpreter
from .operations import BINARY

MAX_SOURCE = 64 * 1024
"""Characters of a template; twice the longest in use."""
PARTS = (nodes.Template, nodes.Pair, nodes.Keyword, nodes.Operand, nodes.Slice, nodes.NSRef)
"""Nodes that their parents take apart."""


class Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for training, is a plain block."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's statements in a scope of their own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """A template that was parsed and found to use nothing unknown.

    source: Jinja, as `chat_template` in tokenizer_config.json. special_tokens: `bos_token` and so on, as the template
    names them. Raises ModelError.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE:
            raise ModelError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are read")
        extensions: list[str | type[Extension]] = ["jinja2.ext.loopcontrols", Generation]
        environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        try:
            self._tree = environment.parse(source)
            for node in self._tree.find_all(nodes.Node):
                _check(node)
        except TemplateError as error:
            raise ModelError(f"the chat template is not valid Jinja: {error}") from None
        except (RecursionError, ValueError):
            raise ModelError("the chat template is nested too deeply or has too long a number") from None
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:  # fmt: skip
        """The prompt for some messages. Raises Refused("bad_field") or ("no_prompt").

        A message is a map with a role; its other fields are what the template reads, null counting as absent.
        tools: JSON schemas of functions.
        """
        checked = check_messages(messages)
        if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, dict) for tool in tools)):
            raise Refused("bad_field", "tools must be a list of maps")
        try:
            return self.try_render(checked, add_generation_prompt, tools and list(tools))
        except TemplateFault as fault:
            raise Refused("bad_field", f"messages: the model's chat template does not take them: {fault}") from fault

    def try_render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Any = None) -> str:
        """As `render`, raising what the interpreter raises."""
        variables = self._special_tokens | {
            "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools, "documents": None,
        }  # fmt: skip
        try:
            return Interpreter(variables).render(self._tree)
        except RecursionError as error:
            raise OverBudget("it is nested too deeply") from error


REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; a template finds it under the first two, whichever the client chose."""


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a template sees them. Raises Refused("bad_field") or ("no_prompt")."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise Refused("bad_field", "messages must be a list of maps with role and content")
    if not messages:
        raise Refused("no_prompt", "messages is empty")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(name, str) for name in message):
            raise Refused("bad_field", f"messages[{index}] must be a map with role and content")
        if not isinstance(message.get("role"), str):
            raise Refused("bad_field", f"messages[{index}]: 'role' must be text")
        given = {name: value for name, value in message.items() if value is not None}
        reasoning = next((given[name] for name in REASONING if name in given), None)
        checked.append(given if reasoning is None else {"thinking": reasoning} | given | {REASONING[0]: reasoning})
    return checked


def _check(node: nodes.Node) -> None:
    name = type(node).__name__
    known = name in BINARY or hasattr(Interpreter, f"run_{name}") or hasattr(Interpreter, f"value_{name}")
    if not known and not isinstance(node, PARTS):
        _refuse(node, f"the tag or operator {name}")
    if isinstance(node, nodes.For) and node.recursive:
        _refuse(node, "a recursive loop")
    if isinstance(node, nodes.Getattr | nodes.NSRef) and node.attr.startswith("_"):
        _refuse(node, f"the attribute {node.attr}")
    if isinstance(node, nodes.Filter) and node.name not in FILTERS.keys() | SELECTORS.keys() | {"map"}:
        _refuse(node, f"the filter {node.name}")
    if isinstance(node, nodes.Test) and node.name not in TESTS:
        _refuse(node, f"the test {node.name}")
    if isinstance(node, nodes.Call | nodes.Filter | nodes.Test) and (node.dyn_args or node.dyn_kwargs):
        _refuse(node, "a call with * or **")


def _refuse(node: nodes.Node, what: str) -> None:
    raise ModelError(f"the chat template, line {node.lineno}, uses {what[:120]}, which is not allowed")
