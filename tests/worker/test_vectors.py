"""GPTQ models against what ExLlamaV2 computed: weights to the bit, logits within 0.005."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorayard.shared.errors import ModelError
from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.linear import formats
from lorayard.worker.linear.tensors import Tensors

from ..stepper import Sequence, Stepper
from ..tiny import relative

VECTORS = Path(__file__).parents[1] / "vectors"
INPUTS = json.loads((VECTORS / "input_ids.json").read_text())
MODELS = ["gptq-4bit-g128-sym", "gptq-4bit-g128-sym-actorder", "gptq-4bit-g32-asym"]
SETS: dict[str, list[tuple[str, float]]] = {
    "short": [],
    "short_lora_a": [("lora_a", 1.0)],
    "short_lora_a_scale0.5": [("lora_a", 0.5)],
    "short_lora_a_plus_b": [("lora_a", 1.0), ("lora_b", 1.0)],
    "short_lora_c_rslora": [("lora_c_rslora_qv", 1.0)],
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = shutil.copytree(VECTORS / request.param, tmp_path_factory.mktemp("vectors") / request.param)
    (path / "reference.safetensors").unlink()
    shutil.copy(VECTORS / "embedding-and-head.safetensors", path)
    model = Model(ModelConfig.from_directory(path))
    model.load(devices="cpu")
    return model


def reference(model: Model) -> dict[str, torch.Tensor]:
    return load_file(VECTORS / model.config.path.name / "reference.safetensors")


def test_weights_have_the_given_digests(model: Model) -> None:
    digests = json.loads((VECTORS / model.config.path.name / "sha256.json").read_text())
    tensors = Tensors(sorted(model.config.path.glob("*.safetensors")), ModelError)
    assert set(digests) == set(model.linears)
    for name, linear in model.linears.items():
        packed = formats.format_of(tensors, linear.shape).read(tensors, linear.shape, model.config.quantisation)
        weight = packed.dequantise().T.contiguous()
        assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == digests[name]
        assert torch.equal(linear.weight, weight.float())


def test_logits_under_every_set(model: Model) -> None:
    expected = {name.removeprefix("logits."): rows for name, rows in reference(model).items() if ".short" in name}
    assert set(expected) >= set(SETS) - {"short_lora_c_rslora"}
    for name, rows in expected.items():
        loras = [(Lora.from_directory(model, VECTORS / adapter), scale) for adapter, scale in SETS[name]]
        assert relative(model.logits(INPUTS["short_96"], loras)[64:], rows) < 0.005, name


def test_logits_of_prefill_and_steps_through_an_fp16_cache(model: Model) -> None:
    expected, tokens = reference(model)["logits.long_cache_fp16"], INPUTS["long_608"]
    stepper, sequence = Stepper(model, 1024, dtype="fp16"), Sequence()
    parts = [stepper.step([(sequence, tokens[:600])])[0][592:]]
    parts += [stepper.step([(sequence, tokens[i : i + 1])])[0] for i in range(600, 608)]
    assert relative(torch.cat(parts), expected) < 0.005
