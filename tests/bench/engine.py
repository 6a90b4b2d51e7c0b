"""Speed of the engine alone: prefill and decode tokens a second, with no LoRA, one for all, and a different one each.

    python tests/bench/engine.py [MODEL] [--devices cuda] [--batch 1 --batch 64]

Each figure is the median of the repeats, after a warm-up. `decode` takes the prefill out: for n sequences of N new
tokens it is n (N - 1) / (wall(N) - wall(1)).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from lorayard.demo import ADAPTERS, BASE
from lorayard.worker import Cache, Generator, Lora, Model, ModelConfig, SamplingParams, Tokenizer

GREEDY = SamplingParams(temperature=0)


def distinct_loras(model: Model, source: Path, count: int, folder: Path) -> list[Lora]:
    """`count` adapters of the source's shape with random content of their own."""
    loras = []
    weights = load_file(source / "adapter_model.safetensors")
    for i in range(count):
        path = folder / f"adapter-{i}"
        path.mkdir()
        (path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
        generator = torch.Generator().manual_seed(i)
        noisy = {name: (tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
                 for name, tensor in weights.items()}  # fmt: skip
        save_file(noisy, path / "adapter_model.safetensors")
        loras.append(Lora.from_directory(model, path))
    return loras


def wall(generator: Generator, batch: int, prompt: int, new: int, loras: list[list[Lora]]) -> float:
    """Seconds to answer `batch` random prompts of `prompt` tokens with exactly `new` tokens each."""
    rng = torch.Generator().manual_seed(new)
    vocab = generator.model.config.vocab_size
    prompts = [torch.randint(3, vocab, (prompt,), generator=rng).tolist() for _ in range(batch)]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    generator.generate(prompts, max_tokens=new, min_tokens=new, sampling=GREEDY, loras=loras)
    return time.perf_counter() - start


def measure(generator: Generator, batch: int, prompt: int, new: int, loras: list[list[Lora]], repeats: int) -> str:
    """One line of the table: prefill and decode tokens a second, medians of the repeats."""
    wall(generator, batch, prompt, 2, loras)
    first = statistics.median(wall(generator, batch, prompt, 1, loras) for _ in range(repeats))
    whole = statistics.median(wall(generator, batch, prompt, new, loras) for _ in range(repeats))
    decode = batch * (new - 1) / (whole - first)
    return f"{batch * prompt / first:12,.0f} {decode:12,.0f} {1e3 * batch / decode:12.2f}"


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path), default=BASE)
@click.option(
    "--adapter", type=click.Path(exists=True, path_type=Path), default=ADAPTERS / "shout", help="Shape to copy."
)
@click.option("--devices", default="cpu")
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8), help="Sequences at once; give it again.")
@click.option("--prompt", default=128, help="Tokens of each prompt.")
@click.option("--new", default=32, help="New tokens of each sequence.")
@click.option("--repeats", default=3)
def main(
    model: Path, adapter: Path, devices: str, batches: tuple[int, ...], prompt: int, new: int, repeats: int
) -> None:
    """Measure the engine on one model."""
    engine = Model(ModelConfig.from_directory(model))
    most = max(batches)
    cache = Cache(engine, max_tokens=most * (prompt + new + 256), dtype="fp16")
    engine.load(cache, devices=devices)
    generator = Generator(engine, cache, Tokenizer.from_directory(model), max_batch=most, slots=most)
    where = torch.cuda.get_device_name() if "cuda" in devices else f"CPU, {torch.get_num_threads()} threads"
    click.echo(f"{model.name} on {where}, prompt {prompt}, new {new}, torch {torch.__version__}")
    click.echo(f"{'batch':>5} {'LoRA':>10} {'prefill tok/s':>13} {'decode tok/s':>12} {'ms a step':>12}")
    with tempfile.TemporaryDirectory() as folder:
        loras = distinct_loras(engine, adapter, most, Path(folder))
        for batch in batches:
            for name, sets in {"none": [[]] * batch, "one": [[loras[0]]] * batch,
                               "each": [[lora] for lora in loras[:batch]]}.items():  # fmt: skip
                click.echo(f"{batch:5d} {name:>10} {measure(generator, batch, prompt, new, sets, repeats)}")


if __name__ == "__main__":
    main()
