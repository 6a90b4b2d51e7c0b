"""The same engine on CUDA, in fp16 and bf16."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorayard.demo import ADAPTERS, BASE
from lorayard.shared.errors import ModelError
from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.files import JsonFile
from lorayard.worker.linear import formats
from lorayard.worker.linear.linear import PackedLinear, Shape
from lorayard.worker.linear.quantisation import Quantisation
from lorayard.worker.linear.tensors import Tensors
from lorayard.worker.models.memory import workspace

from ..features import FEATURES, write_feature
from ..packers import PACKERS
from ..stepper import Sequence, Stepper
from ..tiny import reference, reference_logits, relative, write_adapter, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
VECTORS = Path(__file__).parents[1] / "vectors"
PROMPT = torch.randint(3, 160, (300,), generator=torch.Generator().manual_seed(3)).tolist()


def load(path: Path, devices: str | list[str] | dict[str, str] = "cuda") -> Model:
    """The model on CUDA."""
    model = Model(ModelConfig.from_directory(path))
    model.load(devices=devices)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_logits_against_transformers_and_peft(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", dtype=dtype)
    one, two = write_adapter(tmp_path / "one", base, 1), write_adapter(tmp_path / "two", base, 2, r=9, use_rslora=True)
    model = load(base)
    assert model.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    for pairs in ([], [(one, 1.0)], [(one, 0.7), (two, -0.4)]):
        loras = [(Lora.from_directory(model, path), scale) for path, scale in pairs]
        got, expected = model.logits(PROMPT, loras), reference_logits(reference(base, pairs), PROMPT)
        assert got.dtype == torch.float32 and got.device.type == "cpu"
        assert relative(got, expected) < tolerance


@pytest.mark.parametrize("name", FEATURES)
def test_logits_of_every_feature_of_lora(name: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", attention_bias=True, mlp_bias=True)
    adapter, model = write_feature(tmp_path / "adapter", base, name), load(base)
    got = model.logits(PROMPT, [Lora.from_directory(model, adapter)])
    assert relative(got, reference_logits(reference(base, [(adapter, 1.0)]), PROMPT)) < 5e-3


@pytest.mark.parametrize("name", ["gptq-4bit-g128-sym", "gptq-4bit-g128-sym-actorder", "gptq-4bit-g32-asym"])
def test_logits_of_the_gptq_vectors(name: str, tmp_path: Path) -> None:
    path = shutil.copytree(VECTORS / name, tmp_path / name)
    expected = load_file(path / "reference.safetensors")
    (path / "reference.safetensors").unlink()
    shutil.copy(VECTORS / "embedding-and-head.safetensors", path)
    model, tokens = load(path), json.loads((VECTORS / "input_ids.json").read_text())["short_96"]
    assert all(isinstance(linear, PackedLinear) for linear in model.linears.values())
    adapter = Lora.from_directory(model, VECTORS / "lora_a")
    assert relative(model.logits(tokens)[64:], expected["logits.short"]) < 0.005
    if "logits.short_lora_a" in expected:
        assert relative(model.logits(tokens, [adapter])[64:], expected["logits.short_lora_a"]) < 0.005


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "q8", "q6", "q4"])
def test_a_mixed_batch_is_close_to_each_prompt_alone(dtype: str) -> None:
    model = load(BASE)
    adapters = [Lora.from_directory(model, ADAPTERS / name) for name in ("bullets", "json", "shout")]
    sets = [[], *([(adapter, 1.0)] for adapter in adapters), [(adapters[0], 0.5), (adapters[2], 0.5)]]
    stepper, sequences = Stepper(model, dtype=dtype), [Sequence(loras) for loras in sets]
    prompts = [[token + i for token in PROMPT[: 280 + i]] for i in range(len(sets))]
    first = stepper.step([(s, prompt[:-1]) for s, prompt in zip(sequences, prompts, strict=True)])
    last = stepper.step([(s, prompt[-1:]) for s, prompt in zip(sequences, prompts, strict=True)])
    for loras, prompt, *parts in zip(sets, prompts, first, last, strict=True):
        tolerance = {"bf16": 0.03, "q8": 0.02, "q6": 0.05, "q4": 0.05}.get(dtype, 0.01)
        assert relative(torch.cat(parts), model.logits(prompt, loras, dtype)) < tolerance


def test_a_step_takes_no_more_than_the_workspace() -> None:
    model = load(BASE)
    stepper, sequences = Stepper(model, tokens=64 * 256, dtype="q4"), [Sequence() for _ in range(64)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stepper.step([(sequence, PROMPT[i : i + 8]) for i, sequence in enumerate(sequences)])
    assert torch.cuda.max_memory_allocated() - before < workspace(model.config, 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees one CUDA device")
def test_layers_over_two_devices_give_the_same_logits() -> None:
    alone = load(BASE)
    lora = Lora.from_directory(alone, ADAPTERS / "json")
    for devices in ({"cuda:0": "1500KiB", "cuda:1": "1GiB"}, {"cuda:1": "1500KiB", "cuda:0": "1GiB"}):
        both = load(BASE, devices)
        assert len(set(both.layer_devices)) == 2
        assert torch.equal(both.logits(PROMPT, [lora]), alone.logits(PROMPT, [lora]))


def test_auto_takes_every_gpu_and_unload_gives_memory_back() -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = load(BASE, "auto")
    assert {device.type for device in model.layer_devices} == {"cuda"} and torch.cuda.memory_allocated() > before
    model.unload()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("name", [name for name in PACKERS if name.startswith(("gptq", "awq", "exl2"))])
def test_packed_weights_are_the_same_on_cuda(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    tensors, section, expected = PACKERS[name](rng.normal(0, 0.1, (96, 256)).astype(np.float32), rng)
    save_file({f"m.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    how = Quantisation.of(JsonFile(tmp_path / "config.json", ModelError))
    file, shape = Tensors([tmp_path / "m.safetensors"], ModelError), Shape("m", 256, 96)
    linear = formats.read(file, shape, how, torch.device("cuda"), torch.float16)
    assert isinstance(linear, PackedLinear) and np.array_equal(linear.dense().float().cpu().numpy(), expected)
    x = torch.randn(5, 256, device="cuda", dtype=torch.float16)
    assert relative(linear(x), x.float() @ linear.dense().float().T) < 2e-3
