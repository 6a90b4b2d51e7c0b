"""`lorayard generate`: answers of the engine alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from lorayard.demo import ADAPTERS, BASE
from lorayard.shared.errors import UsageError
from lorayard.shared.job import LoraSet, SamplingParams
from lorayard.shared.sampling import PRESETS

from ..cache.storage import Cache
from ..lora.folders import scan
from ..lora.peft import Lora
from ..models.config import ModelConfig
from ..models.devices import over
from ..models.loading import Pace
from ..models.model import Model
from ..models.options import model_options, overrides
from ..text.tokenizer import Tokenizer
from .generator import Generator, Handle

DEFAULT_MAX_TOKENS = 256


@click.command(epilog="Example: lorayard generate --demo --chat --adapter shout 'What does len do?'")
@click.argument("arguments", metavar="[MODEL] PROMPT...", nargs=-1)
@click.option("--demo", is_flag=True, help="Use the demo model and its adapters; give no MODEL.")
@click.option(
    "--adapters", "roots", multiple=True, type=click.Path(path_type=Path), help="A folder of adapter folders."
)
@click.option("--adapter", default="", metavar="SET", help="A LoRA set, such as sql or sql*0.7+pirate*0.3.")
@click.option("--max-tokens", type=click.IntRange(1), help=f"New tokens at most [{DEFAULT_MAX_TOKENS} if they fit].")
@click.option("--temperature", type=float, help="0 is greedy.  [1]")
@click.option("--top-k", type=int, help="Draw from the k likeliest tokens.  [0: all]")
@click.option("--top-p", type=float, help="Draw from the likeliest that sum to p.  [1: all]")
@click.option("--min-p", type=float, help="Drop what is below p times the likeliest.  [0: none]")
@click.option("--preset", default="neutral", type=click.Choice(list(PRESETS)), help="What --set and others change.")
@click.option("--set", "settings", multiple=True, metavar="NAME=JSON", help="Any other setting, such as top_a=0.2.")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--samples", default=1, show_default=True, help="Answers to each prompt.")
@click.option("--ban", multiple=True, metavar="TEXT", help="Text that never comes; may be given several times.")
@click.option("--heal", is_flag=True, help="Let the prompt's last token become a longer one.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template.")
@click.option("--devices", default="auto", show_default=True, help="cpu, or cuda:0,cuda:1 or cuda:0=20GiB,cuda:1=8GiB.")
@click.option("--gpu-split", metavar="GIB,...", help="GiB of each GPU in order, such as 20,8.")
@click.option("--cache-tokens", type=click.IntRange(1), default=32768, show_default=True, help="Tokens of K/V cache.")
@click.option("--cache-dtype", default="fp16", show_default=True, help="fp16, bf16, fp32, q8, q6 or q4.")
@model_options
def generate(
    arguments: tuple[str, ...], demo: bool, roots: tuple[Path, ...], adapter: str, max_tokens: int | None,
    preset: str, settings: tuple[str, ...], samples: int, ban: tuple[str, ...], heal: bool, stop: tuple[str, ...],
    chat: bool, devices: str, gpu_split: str | None, cache_tokens: int, cache_dtype: str, **options: float | None,
) -> None:  # fmt: skip
    """Answer prompts with the engine alone: no Redis, no queue. Several prompts run in one batch.

    --set takes the settings that docs/wire.md lists under Sampling, as JSON: --set mirostat=true.

    MODEL is a folder with config.json, tokenizer.json or tokenizer.model, and *.safetensors.
    Answers come in the order of the prompts.
    """
    folder, prompts = (BASE, arguments) if demo else (Path(arguments[0]) if arguments else None, arguments[1:])
    if folder is None or not prompts:
        raise UsageError("a prompt is missing: give MODEL PROMPT..., or --demo PROMPT...")
    lora_set = LoraSet.parse(adapter)
    changes = overrides(options)
    given = {name: value for name, value in options.items() if value is not None and name not in changes}
    params = SamplingParams.preset(preset, **_read_settings(settings) | given)
    tokenizer = Tokenizer.from_directory(folder)
    encoded = [
        tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
        for prompt in prompts
    ]
    model = Model(ModelConfig.from_directory(folder, **changes))
    cache = Cache(model, cache_tokens, cache_dtype)
    model.load(cache, over(devices, gpu_split), _progress())
    generator = Generator(model, cache, tokenizer)
    loras = _read_adapters(model, lora_set, [*roots, *([ADAPTERS] if demo else [])])
    limits = [max_tokens or max(1, min(DEFAULT_MAX_TOKENS, generator.capacity - len(ids))) for ids in encoded]
    handles = [
        generator.enqueue(
            ids,
            max_tokens=limit,
            sampling=params,
            loras=loras,
            stop=stop,
            n=samples,
            token_healing=heal,
            banned_strings=ban,
        )
        for ids, limit in zip(encoded, limits, strict=True)
    ]
    _stream(generator, [(handle, sample) for handle in handles for sample in range(samples)], prompts)


def _read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Each NAME=JSON, with lists as tuples and the bias as pairs."""
    names = [field.name for field in fields(SamplingParams)]
    read: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in names:
            raise UsageError(f"--set: there is no setting {name!r}; there are: {', '.join(names)}")
        try:
            value = json.loads(text)
        except ValueError:
            raise UsageError(f"--set {name}: {text!r} is not JSON, such as 0.5, true or [1, 2]") from None
        if name == "logit_bias" and isinstance(value, dict):
            value = [(int(id) if id.isdecimal() else id, bias) for id, bias in value.items()]
        read[name] = tuple(value) if isinstance(value, list) else value
    return read


def _read_adapters(model: Model, lora_set: LoraSet, roots: Sequence[Path]) -> list[tuple[Lora, float]]:
    if not lora_set.adapters:
        return []
    found = scan(roots)
    for name in lora_set.ids:
        if name not in found:
            known = f"there are: {', '.join(sorted(found)) or 'none'}"
            raise UsageError("; ".join([f"there is no adapter {name}", known, *found.problems]))
    return [(Lora.from_directory(model, found[name].path), scale) for name, scale in lora_set.adapters]


def _progress() -> Callable[[int, int], None]:
    """Shows how a load goes on stderr: a bar on a terminal, else now and then a line."""
    pace = Pace(lambda words: click.echo(f"loading: {words}", err=True))

    def draw(done: int, total: int) -> None:
        bar = f"loading [{'#' * (30 * done // total):<30}] {pace.words(done, total)}" if done < total else ""
        click.echo(f"\r\033[K{bar}", nl=False, err=True)

    return draw if sys.stderr.isatty() else pace


def _stream(generator: Generator, answers: Sequence[tuple[Handle, int]], prompts: Sequence[str]) -> None:
    """Write the first unfinished answer as it comes, those after it when it is their turn."""
    waiting = dict.fromkeys(answers, "")
    done: set[tuple[Handle, int]] = set()
    for index, answer in enumerate(answers):
        if len(answers) > 1:
            click.echo(f"> {prompts[index * len(prompts) // len(answers)]}")
        click.echo(waiting.pop(answer), nl=False)
        while answer not in done:
            for event in generator.iterate():
                if event.error is not None:
                    raise event.error
                if (event.handle, event.sample) == answer:
                    click.echo(event.text, nl=False)
                else:
                    waiting[event.handle, event.sample] += event.text
                if event.finished:
                    done.add((event.handle, event.sample))
        click.echo()
