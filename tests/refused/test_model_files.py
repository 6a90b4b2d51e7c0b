"""Model folders that must be refused in one sentence that names the file and the tensor or field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorayard.demo import BASE
from lorayard.shared.errors import LorayardError, ModelError, NotSupported, UsageError
from lorayard.worker import Cache, Model, ModelConfig

from ..tiny import write_model

Q = "model.layers.1.self_attn.q_proj"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("refused") / "float")


@pytest.fixture
def folder(float_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(float_model, tmp_path / "model")


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    return shutil.copytree(BASE, tmp_path / "model")


def refuse(path: Path, error: type[LorayardError], *words: str) -> None:
    """Loading must raise `error`, naming `words` in one line, and leave nothing behind."""
    with pytest.raises(error) as raised:
        config = ModelConfig.from_directory(path)
        model = Model(config)
        cache = Cache(model, 256)
        try:
            model.load(cache, devices="cpu")
        finally:
            assert not model.linears and not model.layers and cache.layers[0] is None
    message = str(raised.value)
    assert type(raised.value) is error and "\n" not in message
    assert all(word in message for word in words), message


def with_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the folder's tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / WEIGHTS).items()}
    change(tensors)
    (path / WEIGHTS).unlink()
    save_file(tensors, path / WEIGHTS)
    return path


def with_config(path: Path, **fields: Any) -> Path:
    """Change fields of config.json; ... takes one away."""
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return path


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


FIELDS: list[tuple[dict[str, Any], type[LorayardError], str]] = [
    ({"hidden_size": ...}, ModelError, "has no hidden_size"),
    ({"vocab_size": "many"}, ModelError, "vocab_size must be a whole number"),
    ({"num_hidden_layers": True}, ModelError, "num_hidden_layers must be a whole number"),
    ({"num_hidden_layers": 1 << 29}, ModelError, "num_hidden_layers must be between 1 and 4096"),
    ({"num_attention_heads": 0}, ModelError, "num_attention_heads must be between"),
    ({"intermediate_size": 10**30}, ModelError, "intermediate_size must be between"),
    ({"num_key_value_heads": 3}, ModelError, "must be a multiple of num_key_value_heads"),
    ({"head_dim": 15}, ModelError, "head_dim even"),
    ({"rms_norm_eps": "x"}, ModelError, "rms_norm_eps must be a number"),
    ({"tie_word_embeddings": "no"}, ModelError, "tie_word_embeddings must be true or false"),
    ({"rope_parameters": {"rope_theta": "x"}}, ModelError, "rope_theta"),
    ({"rope_parameters": {"rope_type": "llama3"}}, ModelError, "has no factor"),
    ({"rope_parameters": None, "rope_scaling": {"type": "longrope", "factor": 2.0}}, NotSupported, "'longrope'"),
    ({"architectures": ["MixtralForCausalLM"]}, NotSupported, "MixtralForCausalLM"),
    ({"architectures": ..., "model_type": ...}, ModelError, "has no architectures"),
    ({"hidden_act": "gelu"}, NotSupported, "'gelu'"),
    ({"partial_rotary_factor": 0.5}, NotSupported, "partial_rotary_factor 0.5"),
    ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, NotSupported, "awq with version 'gemv'"),
    ({"quantization_config": {"quant_method": "awq", "zero_point": False}}, NotSupported, "zero_point 'False'"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, NotSupported, "'bitsandbytes'"),
    ({"quantization_config": {"quant_method": "exl3"}}, NotSupported, "'exl3'"),
    ({"quantization_config": {"bits": 5}}, NotSupported, "bits 5"),
    ({"quantization_config": {"bits": "4"}}, ModelError, "bits must be a whole number"),
    ({"quantization_config": {"pack_dtype": "int64"}}, NotSupported, "pack_dtype 'int64'"),
    ({"quantization_config": {"is_marlin_format": True}}, NotSupported, "is_marlin_format"),
    ({"quantization_config": {"checkpoint_format": "marlin"}}, NotSupported, "'marlin'"),
    ({"num_hidden_layers": 3}, ModelError, "model.layers.2.self_attn.q_proj.weight is missing"),
    ({"num_hidden_layers": 1}, NotSupported, "model.layers.1."),
    ({"hidden_size": 128, "head_dim": 16}, ModelError, "has shape [160, 64], expected [160, 128]"),
    ({"vocab_size": 1 << 30}, ModelError, "model.embed_tokens.weight has shape"),
]


@pytest.mark.parametrize(("fields", "error", "words"), FIELDS)
def test_fields_of_the_config(fields: dict[str, Any], error: type[LorayardError], words: str, folder: Path) -> None:
    refuse(with_config(folder, **fields), error, words)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "[" * 100_000, "\ufffe{}"])
def test_a_config_that_is_no_object(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refuse(folder, ModelError, "config.json")


def test_a_config_that_is_too_large(folder: Path) -> None:
    (folder / "config.json").write_text("{" + " " * (8 << 20) + "}")
    with pytest.raises(ModelError, match="config.json is larger than 8 MiB"):
        ModelConfig.from_directory(folder)


def test_no_folder_no_config_no_weights(folder: Path) -> None:
    refuse(folder / "absent", ModelError, "absent is not a folder")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refuse(folder, ModelError, "holds no *.safetensors")
    (folder / "config.json").unlink()
    refuse(folder, ModelError, "config.json cannot be read")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_weights(keep: int, folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refuse(folder, ModelError, WEIGHTS, "not a whole safetensors file")


@pytest.mark.parametrize("at", [0, 3, 7, 8, 9, 40])
def test_a_corrupt_header(at: int, folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[at] ^= 0xFF
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises((ModelError, NotSupported), match="safetensors"):
        Model(ModelConfig.from_directory(folder)).load(devices="cpu")


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[LorayardError], str]] = {
    "missing": (lambda t: t.pop(f"{Q}.weight"), ModelError, f"{Q}.weight is missing"),
    "no norm": (lambda t: t.pop("model.norm.weight"), ModelError, "model.norm.weight is missing"),
    "no head": (lambda t: t.pop("lm_head.weight"), ModelError, "lm_head.weight is missing"),
    "shape": (lambda t: t.update({f"{Q}.weight": torch.zeros(64, 63)}), ModelError,
              f"{Q}.weight has shape [64, 63], expected [64, 64]"),
    "dtype": (lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn)}), NotSupported,
              f"{Q}.weight is F8_E4M3"),
    "int8": (lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64, dtype=torch.int8)}), NotSupported, "is I8"),
    "exl2": (lambda t: rename(t, f"{Q}.weight", f"{Q}.q_weight"), NotSupported, f"{Q}.q_weight is F32"),
    "bias": (lambda t: t.update({f"{Q}.bias": torch.ones(64)}), NotSupported, f"{Q}.bias has no place"),
    "extra": (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}), NotSupported, "q_norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_of_a_float_model(name: str, folder: Path) -> None:
    change, error, words = CHANGES[name]
    refuse(with_tensors(folder, change), error, WEIGHTS if error is not ModelError else "", words)


def test_one_tensor_in_two_files(folder: Path) -> None:
    save_file({f"{Q}.weight": torch.zeros(64, 64)}, folder / "extra.safetensors")
    refuse(folder, ModelError, f"{Q}.weight is in both", "extra.safetensors", WEIGHTS)


def qweight(shape: tuple[int, int]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda t: t.update({f"{Q}.qweight": torch.zeros(shape, dtype=torch.int32)})


GPTQ: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[LorayardError], str]] = {
    "8 bits": (qweight((64, 256)), ModelError, f"{Q}.qweight has numbers of 8 bits, where config.json says 4"),
    "2 bits": (qweight((16, 256)), ModelError, "2 bits"),
    "3 bits": (qweight((24, 256)), ModelError, "3 bits"),
    "shape": (qweight((31, 256)), ModelError, f"{Q}.qweight has shape [31, 256], expected [32, 256]"),
    "no scales": (lambda t: t.pop(f"{Q}.scales"), ModelError, f"{Q}.scales is missing"),
    "groups": (lambda t: t.update({f"{Q}.scales": torch.zeros(3, 256).half()}), ModelError, "expected [4, 256]"),
    "zeros": (lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"].float()}), NotSupported, f"{Q}.qzeros is F32"),
    "g_idx high": (lambda t: t[f"{Q}.g_idx"].fill_(4), ModelError, f"{Q}.g_idx names groups outside 0 to 3"),
    "g_idx low": (lambda t: t[f"{Q}.g_idx"].fill_(-1), ModelError, f"{Q}.g_idx names groups outside"),
}


@pytest.mark.parametrize("name", GPTQ)
def test_tensors_of_a_gptq_model(name: str, gptq: Path) -> None:
    change, error, words = GPTQ[name]
    refuse(with_tensors(gptq, change), error, words)


def test_act_order_without_g_idx(gptq: Path) -> None:
    section = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
    with_config(with_tensors(gptq, lambda t: t.pop(f"{Q}.g_idx")), quantization_config=section)
    refuse(gptq, ModelError, f"{Q}.g_idx is missing")


@pytest.mark.parametrize("size", [0, -2])
def test_an_impossible_group_size(size: int, gptq: Path) -> None:
    refuse(with_config(gptq, quantization_config={"group_size": size}), ModelError, "group_size")


@pytest.mark.parametrize(
    ("devices", "words"),
    [("tpu", "'tpu' must be"), ("cuda:99", "no device cuda:99"), ([], "no device"), ({"cpu": "many"}, "'many'")],
)
def test_devices_that_are_not_there(devices: Any, words: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=words):
        Model(ModelConfig.from_directory(folder)).load(devices=devices)


def test_a_model_too_large_for_its_limits(folder: Path) -> None:
    with pytest.raises(ModelError, match="need .* MiB, the devices give cpu 0.0 MiB"):
        Model(ModelConfig.from_directory(folder)).load(devices={"cpu": "10KiB"})


@pytest.mark.parametrize(("dtype", "error"), [("q8", NotSupported), ("q4", NotSupported), ("int", UsageError)])
def test_caches_that_are_not_done(dtype: str, error: type[LorayardError], folder: Path) -> None:
    with pytest.raises(error, match=dtype):
        Cache(Model(ModelConfig.from_directory(folder)), 256, dtype)


@pytest.mark.parametrize("token_ids", [[], [[1]], [-1], [160], [0] * 1025])
def test_token_ids_out_of_range(token_ids: Any, folder: Path) -> None:
    model = Model(ModelConfig.from_directory(folder))
    model.load(devices="cpu")
    with pytest.raises(UsageError, match="token"):
        model.logits(token_ids)


def test_a_model_that_is_not_loaded(folder: Path) -> None:
    with pytest.raises(UsageError, match="not loaded"):
        Model(ModelConfig.from_directory(folder)).logits([1])
