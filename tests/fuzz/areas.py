"""The areas that are fuzzed: each makes cases out of valid input and small changes of it."""

from __future__ import annotations

import io
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from lorayard.demo import BASE
from lorayard.shared.errors import REFUSALS
from lorayard.shared.job import Job

from .child import Case
from .hostile_templates import MESSAGES, TOOLS, random_template
from .mutate import hostile_value, mutate_bytes, mutate_safetensors, mutate_value, to_json

Make = Callable[[random.Random], Case]
TEMPLATES = Path(__file__).parent.parent / "worker" / "templates"


def wire(folder: Path) -> Make:
    """Entries of the intake streams, with payloads, and of the control stream."""
    from lorayard.dispatcher.ingress import cancelled_id, forgotten_ids
    from lorayard.dispatcher.published import Adapter, Published
    from lorayard.dispatcher.validate import Entry, judge, record

    logging.disable()
    adapters = {name: Adapter(rank, "ab" * 16, 1000) for name, rank in (("sql", 8), ("pirate", 200), ("chat", 64))}
    yard = Published(4096, 256, 1000, True, adapters)

    def check(entry: Entry) -> None:
        judged = judge(entry, yard)
        assert (judged.job is None) != (judged.refusal is None)
        if judged.job is not None:
            assert Job.unpack(judged.job.pack()) == judged.job and record(judged.job)
        else:
            assert judged.refusal.code in REFUSALS.keys() - {"internal"}
            raise judged.refusal

    def make(draw: random.Random) -> Case:
        if draw.randrange(10) == 0:
            fields = {b"op": b"cancel", b"id": b"x" * 5} | _flat(draw, {"op": "cancel", "id": "job-1"})
            ids = {b"op": b"forget", b"ids": b'["x"]'} | _flat(draw, {"op": "forget", "ids": ["job-1", "job-2"]})
            return (lambda: cancelled_id(fields)) if draw.randrange(2) else lambda: forgotten_ids(ids)
        given = draw.sample(sorted(REQUEST), draw.randrange(1, 6))
        request = {name: REQUEST[name] for name in given}
        flat = _flat(draw, request)
        if draw.randrange(2):
            payload = mutate_value(draw, REQUEST | {"adapters": [{"name": "sql", "scale": 0.5}]})
            packed = _packed(payload)
            flat[b"payload"] = mutate_bytes(draw, packed) if draw.randrange(3) == 0 else packed
        entry = Entry(draw.choice(["urgent", "normal", "batch"]), "17-0", flat)
        return lambda: check(entry)

    return make


REQUEST: dict[str, Any] = {
    "id": "job-1", "adapter": "sql*0.7+pirate*0.3", "prompt": "Hello", "tokens": [1, 2, 3], "max_tokens": 16, "n": 1,
    "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5, "top_k": 40, "top_p": 0.9, "seed": 7,
    "stop": ["\n", 5], "stream": 1, "reply": "batch", "batch": "b-1", "deadline_ms": 1 << 41, "ttl": 60,
    "min_tokens": 1, "add_bos": 1, "adapter_digest": "ab" * 16, "repetition_penalty": 1.1,
}  # fmt: skip


def _flat(draw: random.Random, request: dict[str, Any]) -> dict[bytes, bytes]:
    """Fields as Redis gives them: bytes, lists as JSON; most of them as they should be."""
    flat = {}
    for name, value in request.items():
        if draw.randrange(3) == 0:
            value = hostile_value(draw)
        text = value if isinstance(value, str) else json.dumps(value)
        data = text.encode(errors="surrogatepass")
        key = name.encode() if draw.randrange(20) else draw.randbytes(draw.randrange(5))
        flat[key] = mutate_bytes(draw, data) if draw.randrange(5) == 0 else data
    return flat


def _packed(value: Any) -> bytes:
    """msgpack of a value, numbers that it cannot hold as text."""
    try:
        packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    except (OverflowError, ValueError):
        packed = msgpack.packb(
            json.loads(json.dumps(value), parse_int=str), unicode_errors="surrogatepass", default=str
        )
    return packed


def templates(folder: Path) -> Make:
    """Templates of the families with bytes changed or mixed, generated hostile ones, and messages that are changed."""
    from lorayard.worker.text.template import ChatTemplate

    sources = [file.read_text() for file in sorted(TEMPLATES.glob("*.jinja"))]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}

    def make(draw: random.Random) -> Case:
        if draw.randrange(3):
            source = random_template(draw)
        else:
            source = draw.choice(sources)
            if draw.randrange(2):
                source = mutate_bytes(draw, source.encode()).decode(errors="replace")
            if draw.randrange(4) == 0:
                other = draw.choice(sources)
                source = source[: draw.randrange(len(source) + 1)] + other[draw.randrange(len(other)) :]
        messages: Any = mutate_value(draw, MESSAGES) if draw.randrange(2) else MESSAGES
        tools: Any = draw.choice([None, TOOLS, mutate_value(draw, TOOLS)])
        return lambda: ChatTemplate(source, tokens).render(messages, True, tools)

    return make


def tokenizers(folder: Path) -> Make:
    """tokenizer.json, tokenizer.model and the files beside them; a folder that loads then encodes and decodes."""
    from lorayard.worker import Tokenizer

    valid = _tokenizer_folders()

    def use(path: Path) -> None:
        tokenizer = Tokenizer.from_directory(path)
        for text in ("Hello  world!", "a" * 300, "👩‍👩‍👧 <s>\x00▁"):
            ids = tokenizer.encode(text)
            tokenizer.decode(ids)
            stream = tokenizer.stream()
            stream.push([*ids, 0, tokenizer.vocab_size, 1 << 31])
            stream.finish()

    def make(draw: random.Random) -> Case:
        files = dict(draw.choice(valid))
        name = draw.choice(sorted(files))
        if name == "tokenizer.model":
            files[name] = mutate_bytes(draw, files[name])
        else:
            files[name] = to_json(draw, mutate_value(draw, json.loads(files[name])))
        _write(folder / "tokenizer", files)
        return lambda: use(folder / "tokenizer")

    return make


def _tokenizer_folders() -> list[dict[str, bytes]]:
    from sentencepiece import SentencePieceTrainer
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = ["the cat sat on a mat", "a dog ran over it, hello world 123", "naïve café 日本"] * 5
    folders = []
    for kind in ("bpe", "unigram"):
        out = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=out, vocab_size=300, model_type=kind, byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        )  # fmt: skip
        folders += [{"tokenizer.model": out.getvalue(), "tokenizer_config.json": json.dumps(config).encode()}
                    for config in CONFIGS]  # fmt: skip
    alphabet = {letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    level = Tokenizer(models.BPE(alphabet | {"th": 256, "the": 257}, [("t", "h"), ("th", "e")]))
    level.pre_tokenizer, level.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    level.normalizer = normalizers.NFC()
    level.add_special_tokens(["<s>", "</s>"])
    level.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 258)])
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("▁a", -1.5)], 0, False))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    for vocabulary in (level, pieces):
        data = vocabulary.to_str().encode()
        folders += [
            {"tokenizer.json": data, "tokenizer_config.json": json.dumps(config).encode()} for config in CONFIGS
        ]
    older = {"special_tokens_map.json": b'{"bos_token": {"content": "<s>"}}', "added_tokens.json": b'{"<new>": 300}'}
    return [files | {"config.json": b'{"model_type": "llama", "eos_token_id": [1, 2]}'} for files in folders] + [
        files | older for files in folders
    ]


CONFIGS: list[dict[str, Any]] = [
    {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": True, "legacy": True,
     "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "400": {"content": "<x>", "lstrip": True}}},
    {"tokenizer_class": "GemmaTokenizer", "eos_token": {"content": "</s>"}, "extra_special_tokens": ["<a>", "<b>"]},
    {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": False},
]  # fmt: skip


def _write(path: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)


def config(folder: Path) -> Make:
    """config.json with its RoPE and quantisation sections."""
    from lorayard.worker import ModelConfig

    bases = [json.loads((BASE / "config.json").read_text())]
    bases.append(bases[0] | {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": LLAMA3 | {"type": "linear"}})
    bases.append(bases[0] | {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}, "head_dim": 16})
    path = folder / "config"

    def make(draw: random.Random) -> Case:
        _write(path, {"config.json": to_json(draw, mutate_value(draw, draw.choice(bases)))})
        return lambda: ModelConfig.from_directory(path)

    return make


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def model_and_adapter(folder: Path) -> tuple[Path, Path]:
    """A small model and an adapter for it, written unless they are there: that takes longer than all else."""
    base, good = folder / "base", folder / "good"
    if not good.is_dir():
        from ..tiny import write_adapter, write_model

        write_model(base, vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        write_adapter(good, base)
    return base, good


def weights(folder: Path) -> Make:
    """Safetensors files and shard indices of a float model and of a quantised one, and configs that fit them badly."""
    from lorayard.worker import Model, ModelConfig

    valid = [_files(model_and_adapter(folder)[0]), _files(BASE)]
    for files in valid:
        names = list(
            json.loads(files["model.safetensors"][8:][: int.from_bytes(files["model.safetensors"][:8], "little")])
        )
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    path = folder / "weights"

    def make(draw: random.Random) -> Case:
        files = dict(valid[draw.randrange(5) == 0])
        name = draw.choice(["model.safetensors"] * 4 + sorted(files))
        if name == "model.safetensors":
            files[name] = mutate_safetensors(draw, files[name])
        else:
            files[name] = to_json(draw, mutate_value(draw, json.loads(files[name])))
        _write(path, files)
        return lambda: Model(ModelConfig.from_directory(path)).load(devices="cpu")

    return make


def formats(folder: Path) -> Make:
    """A linear in every weight format: its file's header, its numbers, and what config.json says of it."""
    import numpy as np
    import torch
    from safetensors.torch import save

    from lorayard.shared.errors import ModelError
    from lorayard.worker.files import JsonFile
    from lorayard.worker.linear import formats
    from lorayard.worker.linear.linear import Shape
    from lorayard.worker.linear.quantisation import Quantisation
    from lorayard.worker.linear.tensors import Tensors

    from ..packers import PACKERS

    valid = []
    for pack in PACKERS.values():
        rng = np.random.default_rng(1)
        tensors, section, _ = pack(rng.normal(size=(64, 128)).astype(np.float32), rng)
        valid.append((save({f"m.{name}": tensor for name, tensor in tensors.items()}), section))
    file, config = folder / "m.safetensors", folder / "config.json"

    def use(shape: Shape) -> None:
        how = Quantisation.of(JsonFile(config, ModelError))
        tensors = Tensors([file], ModelError)
        formats.check(tensors, shape, how)
        linear = formats.read(tensors, shape, how, torch.device("cpu"), torch.float32)
        assert linear.dense().shape == (shape.out_features, shape.in_features)

    def make(draw: random.Random) -> Case:
        data, section = valid[draw.randrange(len(valid))]
        kind, value = draw.randrange(4), {"quantization_config": section}
        if kind == 0:
            data = mutate_safetensors(draw, data)
        elif kind == 1:
            value = mutate_value(draw, value)
        else:
            numbers = bytearray(data)
            for _ in range(draw.randrange(1, 6)):
                numbers[-draw.randrange(1, 600)] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
            data = bytes(numbers)
        file.write_bytes(data)
        config.write_bytes(to_json(draw, value))
        inputs, outputs = draw.choice([128] * 5 + [64, 96, 1]), draw.choice([64] * 5 + [32, 50, 1])
        return lambda: use(Shape("m", inputs, outputs, draw.random() < 0.05))

    return make


def adapters(folder: Path) -> Make:
    """adapter_config.json and adapter tensors for a small model."""
    from lorayard.worker import Lora, Model, ModelConfig

    base, good = model_and_adapter(folder)
    model = Model(ModelConfig.from_directory(base))
    model.load(devices="cpu")
    path = folder / "adapter"

    def make(draw: random.Random) -> Case:
        files = _files(good)
        if draw.randrange(2):
            files["adapter_model.safetensors"] = mutate_safetensors(draw, files["adapter_model.safetensors"])
        else:
            data = json.loads(files["adapter_config.json"])
            files["adapter_config.json"] = to_json(draw, mutate_value(draw, data))
        if draw.randrange(10) == 0:
            files["adapter_model.bin"] = mutate_bytes(draw, files.pop("adapter_model.safetensors"))
        _write(path, files)
        return lambda: Lora.from_directory(model, path)

    return make


def _files(path: Path) -> dict[str, bytes]:
    """The files that a loader of a model or of an adapter reads."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix in (".json", ".safetensors")
            and "token" not in file.name}  # fmt: skip
