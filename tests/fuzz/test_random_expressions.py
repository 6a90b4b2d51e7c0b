"""Random expressions of Jinja: what our interpreter prints is what Jinja prints, or it refuses."""

from __future__ import annotations

import copy
import random

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lorayard.worker.text.template import ChatTemplate

from . import hostile_templates
from .hostile_templates import MESSAGES, expression

SMALL = "0 1 2 -1 3 7 0.5 true false none".split()
SHAPES = [
    "{{ X }}", "{% if X %}yes{% else %}no{% endif %}", "{% set q = X %}{{ q }}{{ q | tojson }}", "{{ X | list }}",
    "{% for i in X %}{{ i }}{{ loop.index }}{{ loop.changed(i) }}{% endfor %}", "{{ X | default('d', true) ~ '.' }}",
]  # fmt: skip
UNPRINTABLE = (" object at 0x", "dict_", "range(", "Markup(", "Range(", "'r', 'a', 'n', 'g', 'e'", "RANGE(")
"""In what Jinja prints: names of things that nobody means to print, where ours prints or refuses what they hold."""


def test_random_expressions_mean_what_they_mean_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile_templates, "NUMBERS", SMALL)
    draw, equal = random.Random(1), 0
    for _ in range(2000):
        source = "{% set a = 'aB' %}{% set b = [1, 'x'] %}{% set ns = namespace(x='aa') %}" + draw.choice(SHAPES)
        source = source.replace("X", expression(draw, draw.choice([1, 1, 2])))
        given = {"bos_token": "<s>", "add_generation_prompt": True}
        try:
            [expected], _ = render_jinja_template([copy.deepcopy(MESSAGES)], chat_template=source, **given)
            text = ChatTemplate(source, {"bos_token": "<s>"}).render(copy.deepcopy(MESSAGES), True)
        except Exception:  # the expression means nothing
            continue
        if not any(part in expected for part in UNPRINTABLE):
            assert text == expected, source
            equal += 1
    assert equal > 400
