"""Options of commands that change what a model's config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

OPTIONS = (
    ("--rope-scale", click.FloatRange(1), "Divide positions by this, as linear RoPE scaling does."),
    ("--rope-alpha", click.FloatRange(1), "Stretch RoPE's base for texts about this many times as long (NTK)."),
    ("--max-seq-len", click.IntRange(1), "Longest text in tokens. Default: what config.json says."),
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them; the command gets each under its name in ModelConfig.from_directory, None if it is not given."""
    for name, kind, words in OPTIONS:
        command = click.option(name, type=kind, help=words)(command)
    return command


def overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that were given, for ModelConfig.from_directory."""
    names = [name.removeprefix("--").replace("-", "_") for name, _, _ in OPTIONS]
    return {name: options[name] for name in names if options.get(name) is not None}
