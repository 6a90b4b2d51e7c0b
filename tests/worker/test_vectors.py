"""GPTQ and EXL2 models against what ExLlamaV2 computed: weights to the bit, logits within 0.005."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorayard.shared.errors import ModelError
from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.files import JsonFile
from lorayard.worker.linear import formats
from lorayard.worker.linear.linear import Packed, Shape
from lorayard.worker.linear.quantisation import Quantisation
from lorayard.worker.linear.tensors import Tensors

from ..stepper import Sequence, Stepper
from ..tiny import relative

VECTORS = Path(__file__).parents[1] / "vectors"
STORED = [
    "gptq-4bit-g128-sym", "gptq-4bit-g128-sym-actorder", "gptq-4bit-g32-asym", "exl2-2.6bpw-h6", "exl2-4.25bpw-h6",
    "qwen2/exl2-4.25bpw-h6", "mistral/gptq-4bit-g128-sym",
]  # fmt: skip
OTHER_ROPE = "exl2-4.25bpw-h6-llama3rope"
SETS: dict[str, list[tuple[str, float]]] = {
    "short_lora_a": [("lora_a", 1.0)],
    "short_lora_a_scale0.5": [("lora_a", 0.5)],
    "short_lora_a_plus_b": [("lora_a", 1.0), ("lora_b", 1.0)],
    "short_lora_c_rslora": [("lora_c_rslora_qv", 1.0)],
}
Q = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module", params=[*STORED, OTHER_ROPE])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stored(name: str) -> Path:
    """The file of the model's quantised tensors."""
    folder = VECTORS / name.removesuffix("-llama3rope")
    return folder / ("model.safetensors" if "gptq" in name else "output.safetensors")


def config(name: str) -> Path:
    return VECTORS / name / "config.json"


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("vectors")
    shutil.copy(config(name), path)
    shutil.copy(stored(name), path)
    if "/" not in name:  # models of one family share what is not quantised
        floats = load_file(VECTORS / "embedding-and-head.safetensors")
        save_file(floats if "gptq" in name else {EMBEDDING: floats[EMBEDDING]}, path / "floats.safetensors")
    model = Model(ModelConfig.from_directory(path))
    model.load(devices="cpu")
    return model


@pytest.fixture(scope="module")
def inputs(name: str) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = json.loads(((VECTORS / name).parent / "input_ids.json").read_text())
    return ids


@pytest.fixture(scope="module")
def reference(name: str) -> dict[str, Tensor]:
    return load_file(VECTORS / name / "reference.safetensors")


def adapters(model: Model, name: str, pairs: list[tuple[str, float]]) -> list[tuple[Lora, float]]:
    folder = (VECTORS / name).parent
    return [(Lora.from_directory(model, folder / adapter), scale) for adapter, scale in pairs]


def packed(name: str, linear: str) -> Packed:
    """The packed tensors of a model's linear, checked, with its columns of padding."""
    tensors, how = Tensors([stored(name)], ModelError), Quantisation.of(JsonFile(config(name), ModelError))
    inputs = (tensors.entries.get(f"{linear}.g_idx") or tensors.entries[f"{linear}.q_invperm"]).shape[0]
    words = tensors.entries.get(f"{linear}.qweight") or tensors.entries[f"{linear}.q_weight"]
    shape = Shape(linear, inputs, words.shape[1])
    form = formats.format_of(tensors, shape)
    form.check(tensors, shape, how)
    weights = form.read(tensors, shape, how)
    assert not isinstance(weights, Tensor)
    return weights


@pytest.mark.parametrize("each", STORED)
def test_weights_have_the_given_digests(each: str) -> None:
    digests = json.loads((VECTORS / each / "sha256.json").read_text())
    assert len(digests) == 14 + ("exl2" in each)
    for linear, digest in digests.items():
        weight = packed(each, linear).dequantise().T.contiguous()
        assert weight.dtype == torch.float16
        assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == digest, linear


@pytest.mark.parametrize("each", STORED)
def test_a_linear_on_given_rows(each: str) -> None:
    rows, floats = load_file(VECTORS / each / "reference.safetensors"), load_file(stored(each))
    y = packed(each, Q).multiply(rows[f"linear.{Q}.x7"].float(), floats.get(f"{Q}.bias"))
    assert relative(y, rows[f"linear.{Q}.y7"]) < 0.001


def test_logits(model: Model, inputs: dict[str, list[int]], reference: dict[str, Tensor]) -> None:
    got = model.logits(inputs["short_96"])
    assert relative(got[64:], reference["logits.short"]) < 0.005
    assert relative(got[:16], reference["logits.short_first16_smallrows"]) < 0.005


def test_logits_under_every_set(
    name: str, model: Model, inputs: dict[str, list[int]], reference: dict[str, Tensor]
) -> None:
    expected = {key.removeprefix("logits."): rows for key, rows in reference.items() if "_lora_" in key}
    assert name == OTHER_ROPE or set(expected) >= set(SETS) - {"short_lora_c_rslora"}
    for key, rows in expected.items():
        got = model.logits(inputs["short_96"], adapters(model, name, SETS[key]))
        assert relative(got[64:], rows) < 0.005, key


def test_logits_of_prefill_and_steps_through_an_fp16_cache(
    model: Model, inputs: dict[str, list[int]], reference: dict[str, Tensor]
) -> None:
    tokens = inputs["long_608"]
    stepper, sequence = Stepper(model, 1024, dtype="fp16"), Sequence()
    parts = [stepper.step([(sequence, tokens[:600])])[0][592:]]
    parts += [stepper.step([(sequence, tokens[i : i + 1])])[0] for i in range(600, 608)]
    assert relative(torch.cat(parts), reference["logits.long_cache_fp16"]) < 0.005


def test_greedy_tokens_where_the_margin_allows(
    name: str, model: Model, inputs: dict[str, list[int]], reference: dict[str, Tensor]
) -> None:
    for key, pairs in (("greedy32.base", []), ("greedy32.lora_a", SETS["short_lora_a"])):
        if key in reference:
            tokens, margin = reference[key], reference[f"{key}.margin"]
            logits = model.logits([*inputs["short_96"], *tokens.tolist()], adapters(model, name, pairs))[95:-1]
            wide = margin > 0.1
            assert wide.sum() > 16 and torch.equal(logits.argmax(-1)[wide], tokens[wide]), key
