"""Every weight format against NumPy's statement of it, to the bit, alone and mixed in one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorayard.kernels.bits import unpack
from lorayard.shared.errors import ModelError
from lorayard.worker import Model, ModelConfig
from lorayard.worker.files import JsonFile
from lorayard.worker.linear import formats
from lorayard.worker.linear.linear import Linear, PackedLinear, Shape
from lorayard.worker.linear.quantisation import Quantisation
from lorayard.worker.linear.tensors import Tensors

from ..packers import MIXABLE, PACKERS, pack_model, stream
from ..tiny import reference, reference_logits, relative, write_model

CPU = torch.device("cpu")
SIZES = [(96, 64), (32, 160), (160, 128)]


def random(shape: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.1, shape).astype(np.float32), rng


def written(path: Path, tensors: dict[str, Tensor], section: dict[str, Any]) -> tuple[Tensors, Quantisation]:
    """A file of the linear `m`, and what config.json says of it."""
    save_file({f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}, path / "m.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": section}))
    return Tensors([path / "m.safetensors"], ModelError), Quantisation.of(JsonFile(path / "config.json", ModelError))


def loaded(tensors: Tensors, how: Quantisation, shape: Shape) -> Linear:
    formats.check(tensors, shape, how)
    assert {name.removeprefix("m.") for name in tensors.entries} <= formats.parts(tensors, shape)
    return formats.read(tensors, shape, how, CPU, torch.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_numbers_come_out_of_their_words(bits: int) -> None:
    levels = np.random.default_rng(bits).integers(0, 2**bits, (96, 8))
    assert np.array_equal(unpack(torch.from_numpy(stream(levels, bits)), bits).numpy(), levels)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PACKERS)
def test_weights_to_the_bit(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    weight, rng = random(size)
    tensors, section, expected = PACKERS[name](weight, rng)
    file, how = written(tmp_path, {**tensors, "bias": torch.ones(size[0])}, section)
    shape = Shape("m", size[1], size[0], bias=True)
    linear = loaded(file, how, shape)
    assert np.array_equal(linear.dense().numpy(), expected)
    x = torch.from_numpy(rng.normal(size=(3, size[1])).astype(np.float32))
    assert torch.allclose(linear(x), x @ torch.from_numpy(expected).T + 1, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PACKERS if "bit" in name or name in ("awq", "exl2")])
def test_the_packed_linear_multiplies_by_the_same_weights(name: str, tmp_path: Path) -> None:
    weight, rng = random((50 if "exl2" in name else 64, 128), 1)
    tensors, section, expected = PACKERS[name](weight, rng)
    file, how = written(tmp_path, tensors, section)
    shape = Shape("m", 128, len(weight))
    formats.check(file, shape, how)
    linear = PackedLinear(shape, formats.format_of(file, shape).read(file, shape, how), None, torch.float32)
    assert np.array_equal(linear.dense().numpy(), expected)
    x = torch.from_numpy(rng.normal(size=(3, 128)).astype(np.float32))
    assert torch.allclose(linear(x), x @ torch.from_numpy(expected).T, atol=1e-5)
    assert torch.equal(
        PackedLinear(shape, linear.packed.to(CPU), torch.ones(len(weight)), torch.float32)(x), linear(x) + 1
    )


@pytest.mark.parametrize("outputs", [33, 70, 1030])
@pytest.mark.parametrize("bias", [False, True])
def test_columns_of_padding_are_cut_off(outputs: int, bias: bool, tmp_path: Path) -> None:
    weight, rng = random((outputs, 64))
    tensors, section, expected = PACKERS["exl2"](weight, rng)
    assert tensors["q_weight"].shape[1] % 32 == 0
    extra = {"bias": torch.ones(outputs)} if bias else {}
    linear = loaded(*written(tmp_path, tensors | extra, section), Shape("m", 64, outputs, bias))
    assert np.array_equal(linear.dense().numpy(), expected) and linear(torch.ones(1, 64)).shape == (1, outputs)
    assert linear.bias is None or torch.equal(linear.bias, torch.ones(outputs))


def test_q_perm_and_narrow_permutations_are_read(tmp_path: Path) -> None:
    weight, rng = random((32, 64))
    tensors, section, expected = PACKERS["exl2"](weight, rng)
    tensors["q_perm"] = tensors["q_invperm"].argsort().to(torch.int16)
    tensors["q_invperm"] = tensors["q_invperm"].to(torch.int16)
    assert np.array_equal(loaded(*written(tmp_path, tensors, section), Shape("m", 64, 32)).dense().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """bf16 is exact in fp16 here, and fp32 stays what it is."""
    weight, rng = random((64, 64))
    tensors, section, _ = PACKERS["gptq-4bit"](weight, rng)
    tensors["scales"] = tensors["scales"].to(dtype) * (1 + 2**-20 if dtype == torch.float32 else 1)
    linear = loaded(*written(tmp_path, tensors, section), Shape("m", 64, 64))
    q = tensors["qweight"][:, None] >> torch.arange(0, 32, 4)[:, None] & 15
    zeros = (tensors["qzeros"][..., None] >> torch.arange(0, 32, 4) & 15).flatten(1) + 1
    scales = tensors["scales"].float()
    exact = (q.flatten(0, 1) - zeros.repeat_interleave(32, 0)) * scales.repeat_interleave(32, 0)
    assert torch.equal(linear.dense().T, exact if dtype == torch.float32 else exact.half().float())


def test_settings_of_single_modules(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: the first pattern that a name begins with counts, else what all modules have."""
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {
        r"-:model\.layers\.1\..*": {}, r"+:.*\.(?:up|down)_proj$": {"bits": 8, "group_size": -1},
        r"model\.layers\.[2-3]": {"desc_act": True},
    }}  # fmt: skip
    _, how = written(tmp_path, {"weight": torch.zeros(1)}, section)
    found = {name: how.at(f"model.layers.{name}") for name in ("0.q", "0.mlp.up_proj", "1.mlp.up_proj", "2.q", "12.q")}
    assert found.pop("1.mlp.up_proj") is None
    assert {name: (f.bits, f.group_size, f.act_order) for name, f in found.items() if f} == {
        "0.q": (4, 32, False), "0.mlp.up_proj": (8, -1, False), "2.q": (4, 32, True), "12.q": (4, 32, False),
    }  # fmt: skip


def test_a_module_of_other_bits_among_its_like(tmp_path: Path) -> None:
    weight, rng = random((64, 64))
    tensors, section, expected = PACKERS["gptq-8bit"](weight, rng)
    one = {"bits": 4, "group_size": 128, "dynamic": {"+:m": {"bits": 8, "group_size": 32}}}
    linear = loaded(*written(tmp_path, tensors, section | one), Shape("m", 64, 64))
    assert np.array_equal(linear.dense().numpy(), expected)
    with pytest.raises(ModelError, match=r"m\.qweight has numbers of 8 bits, where config.json says 4"):
        loaded(*written(tmp_path, tensors, section | one | {"dynamic": {}}), Shape("m", 64, 64))
    with pytest.raises(ModelError, match="m is packed, where config.json says that it is not"):
        loaded(*written(tmp_path, tensors, section | {"dynamic": {"-:.*": {}}}), Shape("m", 64, 64))


LEGACY: list[tuple[str, str, dict[str, Any]]] = [
    ("gptq-4bit", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "damp_percent": 0.01}),
    ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    ("awq", "quantize_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    ("gptq-v2", "quantize_config.json", {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}),
    ("gptq-one-group", "quantize_config.json", {"bits": 4, "group_size": -1}),
]


@pytest.mark.parametrize(("name", "beside", "section"), LEGACY)
def test_settings_beside_the_config(name: str, beside: str, section: dict[str, Any], tmp_path: Path) -> None:
    weight, rng = random((64, 64))
    tensors, _, expected = PACKERS[name](weight, rng)
    (tmp_path / beside).write_text(json.dumps(section))
    file, how = written(tmp_path, tensors, {})
    assert how.path.name == beside and how.group_size in (32, -1)
    assert np.array_equal(loaded(file, how, Shape("m", 64, 64)).dense().numpy(), expected)


@pytest.mark.parametrize("name", MIXABLE)
def test_tensors_tell_bits_and_groups_where_no_config_does(name: str, tmp_path: Path) -> None:
    weight, rng = random((64, 128))
    tensors, _, expected = PACKERS[name](weight, rng)
    linear = loaded(*written(tmp_path, tensors, {}), Shape("m", 128, 64))
    assert np.array_equal(linear.dense().numpy(), expected)


@pytest.mark.parametrize("flavours", [MIXABLE, ["gptq-3bit-v2"], ["exl2"]], ids=["mixed", "gptq", "exl2"])
def test_a_model_against_transformers(flavours: list[str], tmp_path: Path) -> None:
    """Mixed: each linear of its own format; the config's group size holds for all that need one."""
    source, packed, exact = (tmp_path / name for name in ("source", "packed", "exact"))
    pack_model(write_model(source, num_hidden_layers=3), packed, exact, flavours)
    model = Model(ModelConfig.from_directory(packed))
    model.load(devices="cpu")
    assert model.head is not None
    for name, weight in load_file(exact / "model.safetensors").items():
        linear = {**model.linears, "lm_head": model.head}.get(name.removesuffix(".weight"))
        assert linear is None or torch.equal(linear.dense(), weight), name
    ids = list(range(3, 40))
    expected = reference_logits(reference(exact, []), ids)
    assert relative(model.logits(ids), expected) < 1e-4
    assert relative(reference_logits(reference(source, []), ids), expected) > 0.01
