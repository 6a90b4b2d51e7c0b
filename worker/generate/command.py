"""`lorayard generate`: answers of the engine alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from lorayard.demo import ADAPTERS, BASE
from lorayard.shared.errors import UsageError
from lorayard.shared.job import LoraSet, SamplingParams

from ..cache.storage import Cache
from ..lora.folders import scan
from ..lora.peft import Lora
from ..models.config import ModelConfig
from ..models.loading import Pace
from ..models.model import Model
from ..models.placement import Devices
from ..text.tokenizer import Tokenizer
from .generator import Generator

DEFAULT_MAX_TOKENS = 256
NEUTRAL = SamplingParams()


@click.command(epilog="Example: lorayard generate --demo --chat --adapter shout 'What does len do?'")
@click.argument("arguments", metavar="[MODEL] PROMPT...", nargs=-1)
@click.option("--demo", is_flag=True, help="Use the demo model and its adapters; give no MODEL.")
@click.option(
    "--adapters", "roots", multiple=True, type=click.Path(path_type=Path), help="A folder of adapter folders."
)
@click.option("--adapter", default="", metavar="SET", help="A LoRA set, such as sql or sql*0.7+pirate*0.3.")
@click.option("--max-tokens", type=click.IntRange(1), help=f"New tokens at most [{DEFAULT_MAX_TOKENS} if they fit].")
@click.option("--temperature", default=NEUTRAL.temperature, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=NEUTRAL.top_k, show_default=True, help="Draw from the k likeliest tokens; 0 is all.")
@click.option("--top-p", default=NEUTRAL.top_p, show_default=True, help="Draw from the likeliest that sum to p.")
@click.option("--min-p", default=NEUTRAL.min_p, show_default=True, help="Drop what is below p times the likeliest.")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template.")
@click.option("--devices", default="auto", show_default=True, help="cpu, or cuda:0,cuda:1 or cuda:0=20GiB,cuda:1=8GiB.")
def generate(
    arguments: tuple[str, ...], demo: bool, roots: tuple[Path, ...], adapter: str, max_tokens: int | None,
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None, stop: tuple[str, ...], chat: bool,
    devices: str,
) -> None:  # fmt: skip
    """Answer prompts with the engine alone: no Redis, no queue. Several prompts run in one batch.

    MODEL is a folder with config.json, tokenizer.json and *.safetensors. Answers come in the order of the prompts.
    """
    folder, prompts = (BASE, arguments) if demo else (Path(arguments[0]) if arguments else None, arguments[1:])
    if folder is None or not prompts:
        raise UsageError("a prompt is missing: give MODEL PROMPT..., or --demo PROMPT...")
    lora_set = LoraSet.parse(adapter)
    sampling = SamplingParams(temperature, top_k, top_p, min_p, seed=seed)
    tokenizer = Tokenizer.from_directory(folder)
    encoded = [
        tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
        for prompt in prompts
    ]
    model = Model(ModelConfig.from_directory(folder))
    cache = Cache(model)
    model.load(cache, _devices(devices), _progress())
    generator = Generator(model, cache, tokenizer)
    loras = _read_adapters(model, lora_set, [*roots, *([ADAPTERS] if demo else [])])
    limits = [max_tokens or max(1, min(DEFAULT_MAX_TOKENS, generator.capacity - len(ids))) for ids in encoded]
    handles = [
        generator.enqueue(ids, max_tokens=limit, sampling=sampling, loras=loras, stop=stop)
        for ids, limit in zip(encoded, limits, strict=True)
    ]
    _stream(generator, handles, prompts)


def _devices(text: str) -> Devices:
    """`auto` or one device as it is, several as a list, those with limits as a map."""
    names = text.split(",")
    if "=" in text:
        pairs = [name.partition("=") for name in names]
        return {name: limit for name, _, limit in pairs}
    return names if len(names) > 1 else text


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


def _stream(generator: Generator, handles: Sequence[Any], prompts: Sequence[str]) -> None:
    """Write the first unfinished answer as it comes, those after it when it is their turn."""
    waiting = {handle: "" for handle in handles}
    done = set()
    for handle, prompt in zip(handles, prompts, strict=True):
        if len(prompts) > 1:
            click.echo(f"> {prompt}")
        click.echo(waiting.pop(handle), nl=False)
        while handle not in done:
            for event in generator.iterate():
                if event.error is not None:
                    raise event.error
                if event.handle == handle:
                    click.echo(event.text, nl=False)
                else:
                    waiting[event.handle] += event.text
                if event.finished:
                    done.add(event.handle)
        click.echo()
