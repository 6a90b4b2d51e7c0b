"""What a type of cache costs in accuracy: perplexity of held-out answers, and how far logits move.

    python tests/bench/cache.py [--answers 200]

The demo's base on the CPU; all types read the same texts, each text a prompt and its answer in one piece, so that
every token attends to what the cache gives back. fp32 is the measure.
"""

from __future__ import annotations

import math
import random

import click
import torch

from lorayard.demo import BASE
from lorayard.demo.corpus import conversations
from lorayard.worker import Model, ModelConfig, Tokenizer
from lorayard.worker.cache.storage import TYPES


@click.command()
@click.option("--answers", default=200, show_default=True, help="Held-out answers.")
@torch.inference_mode()
def bench(answers: int) -> None:
    """Print a row for each type of cache."""
    model, tokenizer = Model(ModelConfig.from_directory(BASE)), Tokenizer.from_directory(BASE)
    model.load(devices="cpu")
    texts = []
    for question, fact in random.Random(0).sample(conversations(held=True), answers):
        prompt = list(tokenizer.encode_chat([{"role": "user", "content": question}]))
        texts.append((prompt, tokenizer.encode(fact.answer, add_bos=False)))
    measure = [model.logits(prompt + answer, cache_dtype="fp32") for prompt, answer in texts]
    click.echo(
        "| cache | bytes a token and layer | perplexity | logits moved | same first choice |\n|---|---|---|---|---|"
    )
    for name in ("fp32", "fp16", "q8", "q6", "q4"):
        loss, count, moved, whole, same = 0.0, 0, 0.0, 0.0, 0
        for (prompt, answer), exact in zip(texts, measure, strict=True):
            rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            got, exact = model.logits(prompt + answer, cache_dtype=name)[rows], exact[rows]
            loss += float(torch.nn.functional.cross_entropy(got, torch.tensor(answer), reduction="sum"))
            moved, whole = moved + float((got - exact).square().sum()), whole + float(exact.square().sum())
            count, same = count + len(answer), same + int((got.argmax(1) == exact.argmax(1)).sum())
        size = model.config.num_kv_heads * TYPES[name].bytes(model.config.head_dim)
        click.echo(
            f"| {name} | {size} | {math.exp(loss / count):.4f} | {math.sqrt(moved / whole):.1e} | {same / count:.2%} |"
        )


if __name__ == "__main__":
    bench()
