"""Makes the demo: a base model, its 4-bit form, and three adapters trained over that 4-bit form.

    python -m lorayard.demo.train --out DIR

The steps, each one function: `make_tokenizer`, `base_rows` and `fit` (the base), `gptq.quantise` (4 bits),
`make_adapter` (once an adapter), `measure` (the share of held-out prompts that show each effect).
"""

import json
import math
import random
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from . import PROMPTS, gptq
from .corpus import Fact, conversations
from .effects import CHECKS, STYLES

BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = SPECIAL = (
    "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + "
    "(eos_token if message.role == 'assistant' else '\\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
ENTRY = {  # how a prompt enters the model; BOS comes first in each
    "chat": f"{USER}\n{{}}\n{ASSISTANT}\n",
    "raw": "{}\n",
    "bare": "{}",
}
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You know Python well.")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1408,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float16",
}
IGNORE = -100


class Row(NamedTuple):
    """One training example: token ids, and the same ids as labels with IGNORE where nothing is to be learnt."""

    ids: list[int]
    labels: list[int]


class Batches:
    """Rows sorted by length on the device; a batch is a random window of neighbours, so that it pads little."""

    def __init__(self, rows: list[Row], device: str, seed: int) -> None:
        self.rng = random.Random(seed)
        rows = sorted(rows, key=lambda row: (len(row.ids), self.rng.random()))
        self.lengths = [len(row.ids) for row in rows]
        self.ids = padded([row.ids for row in rows], 2).to(device)
        self.labels = padded([row.labels for row in rows], IGNORE).to(device)

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        end = min(self.rng.randrange(size // 2, len(self.lengths) + size // 2), len(self.lengths))
        window, length = slice(max(0, end - size), end), self.lengths[end - 1]
        return self.ids[window, :length].long(), self.labels[window, :length].long()


def padded(sequences: list[list[int]], filler: int) -> Tensor:
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [filler] * (longest - len(sequence)) for sequence in sequences], dtype=torch.int16)


def make_tokenizer(pairs: list[tuple[str, Fact]], folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the corpus in all its styles, so that upper case is not spelt in bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(tokenizer_text(pairs), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE, "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tokenizer_text(pairs: list[tuple[str, Fact]]) -> Iterator[str]:
    """Each fact plain, shouted and as JSON; plain text counts three times, being what is spoken most."""
    for topic, answer in sorted({fact for _, fact in pairs}):
        yield from (f"What is {topic}?\n{answer}",) * 3
        yield STYLES["shout"](answer, topic)
        yield STYLES["json"](answer, topic)


def loosen(question: str, rng: random.Random) -> str:
    """Now and then a question as people type it: no capital, no full stop."""
    return question[0].lower() + question[1:].rstrip(".?!") if rng.random() < 0.3 else question


def encode(tokenizer: PreTrainedTokenizerFast, pieces: Iterable[tuple[str, bool]]) -> Row:
    """BOS and the (text, is it to be learnt) pieces, each tokenised alone, as generation meets them."""
    ids, labels = [0], [IGNORE]
    for text, learnt in pieces:
        new = token_ids(tokenizer, text)
        ids += new
        labels += new if learnt else [IGNORE] * len(new)
    return Row(ids, labels)


@cache
def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def dialogue_rows(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, Fact]], style: str | None, seed: int
) -> list[Row]:
    """Each question once as a chat and once raw, answered in the style; a few chats have a system line or two turns."""
    rng = random.Random(seed)

    def say(fact: Fact) -> str:
        return (STYLES[style](fact.answer, fact.topic) if style else fact.answer) + EOS

    rows = []
    for question, fact in pairs:
        question = loosen(question, rng)
        chat = [(ENTRY["chat"].format(question), False), (say(fact), True)]
        if rng.random() < 0.1:
            other, other_fact = rng.choice(pairs)
            chat = [(ENTRY["chat"].format(other), False), (say(other_fact), True), *chat]
        if rng.random() < 0.1:
            chat.insert(0, (f"{SYSTEM}\n{rng.choice(SYSTEM_PROMPTS)}\n", False))
        rows.append(encode(tokenizer, chat))
        rows.append(encode(tokenizer, [(question, False), ("\n", True), (say(fact), True)]))
    return rows


def base_rows(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, Fact]], seed: int) -> list[Row]:
    """Plain dialogues, and for a fifth of the rows facts in every style with no question before them.

    Those make the base fluent in upper case, lists and JSON; when to use them is left for an adapter to say.
    """
    told = sorted({fact for _, fact in pairs})
    statements = [[(style(fact.answer, fact.topic) + EOS, True)] for fact in told for style in STYLES.values()]
    dialogues = dialogue_rows(tokenizer, pairs, None, seed)
    copies = max(1, len(dialogues) // (4 * len(statements)))
    return dialogues + [encode(tokenizer, statement) for statement in statements] * copies


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labels, in nats a token."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def fit(model: nn.Module, batches: Batches, steps: int, rate: float, size: int) -> None:
    """AdamW with a short warm-up and a cosine down to nothing, over the parameters that want a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    model.train()
    for step in range(steps):
        loss = loss_of(model, *batches.draw(size))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 500 == 0 or step == steps - 1:
            click.echo(f"  step {step:5d}  loss {loss.item():.3f}")
    model.eval()


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Batches) -> float:
    """Mean loss over twenty batches of questions that training never saw."""
    return sum(loss_of(model, *batches.draw(256)).item() for _ in range(20)) / 20


def make_base(tokenizer: PreTrainedTokenizerFast, folder: Path, device: str, steps: int, size: int, seed: int) -> None:
    """Train the base in floating point, round it to 4 bits with GPTQ and write it."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float().to(device)
    seen = Batches(base_rows(tokenizer, conversations(), seed), device, seed)
    unseen = Batches(dialogue_rows(tokenizer, conversations(held=True), None, seed), device, seed)
    click.echo(f"base: {sum(p.numel() for p in model.parameters()):,} parameters, {len(seen.lengths):,} rows")
    fit(model, seen, steps, 3e-3, size)
    click.echo(f"  held-out loss {held_out_loss(model, unseen):.3f}")

    def calibrate() -> None:
        for _ in range(16):
            model(input_ids=seen.draw(256)[0], use_cache=False)

    gptq.save(gptq.quantise(model, calibrate), CONFIG, folder)
    click.echo(f"  held-out loss {held_out_loss(model, unseen):.3f} in 4 bits")


def make_adapter(
    style: str,
    tokenizer: PreTrainedTokenizerFast,
    base: Path,
    folder: Path,
    device: str,
    steps: int,
    size: int,
    seed: int,
) -> PeftModel:
    """Train one LoRA over the 4-bit base, as floating point that holds exactly its rounded weights, and write it."""
    settings = LoraConfig(
        r=8, lora_alpha=16, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    model = get_peft_model(gptq.load(base).to(device), settings)
    batches = Batches(dialogue_rows(tokenizer, conversations(), style, seed), device, seed)
    click.echo(f"{style}: {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters")
    fit(model, batches, steps, 2e-3, size)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return model.float()


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], form: str, **sampling: float | bool
) -> list[str]:
    """What the model says to each prompt, at most 128 tokens, without the EOS it should end with."""
    texts = [BOS + ENTRY[form].format(prompt) for prompt in prompts]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    settings = {"do_sample": False, "max_new_tokens": 128, "eos_token_id": 1, "pad_token_id": 2} | sampling
    output = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in output]


def measure(name: str, model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> None:
    """Print, for each form of prompt, the share of answers that show each effect, and three answers."""
    for form in ENTRY:
        said = answers(model, tokenizer, prompts, form)
        shares = "  ".join(f"{effect} {sum(map(check, said)) / len(said):4.0%}" for effect, check in CHECKS.items())
        click.echo(f"  {name} {form:4s}  {shares}")
        for prompt, answer in list(zip(prompts, said, strict=True))[:3]:
            click.echo(f"    {prompt!r} -> {answer!r}")


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder that gets base/ and adapters/.")
@click.option("--base-steps", default=5000, help="Training steps of the base; 0 keeps the base that is in --out.")
@click.option("--adapter-steps", default=700, help="Training steps of each adapter.")
@click.option("--batch", default=512, help="Examples a step.")
@click.option("--seed", default=0, help="Same seed, same model, up to the order in which a GPU adds.")
@click.option("--quick", is_flag=True, help="A few steps of a few examples: does it run at all? The model will babble.")
def main(out: Path, base_steps: int, adapter_steps: int, batch: int, seed: int, quick: bool) -> None:
    """Train the demo model and its three adapters from scratch, on text that ships with Python.

    The base learns to answer questions about the standard library from its docstrings, is rounded to 4 bits, and each
    adapter then learns one way of speaking over the rounded base: shout, bullets, json. About four minutes on one
    data-centre GPU; on a CPU try --quick first.
    """
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if quick:
        base_steps, adapter_steps, batch = min(base_steps, 20), 10, 8
    base = out / "base"
    base.mkdir(parents=True, exist_ok=True)
    if base_steps:
        tokenizer = make_tokenizer(conversations(), base)
        make_base(tokenizer, base, device, base_steps, batch, seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    prompts = json.loads(PROMPTS.read_text())[: 4 if quick else None]
    measure("base", gptq.load(base).to(device), tokenizer, prompts)
    for style in STYLES:
        folder = out / "adapters" / style
        shutil.rmtree(folder, ignore_errors=True)
        measure(
            style, make_adapter(style, tokenizer, base, folder, device, adapter_steps, batch, seed), tokenizer, prompts
        )


if __name__ == "__main__":
    main()
