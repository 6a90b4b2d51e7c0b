"""Adapter folders that must be refused in one sentence that names the file and the tensor or key."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorayard.shared.errors import AdapterError, LorayardError, NotSupported, UsageError
from lorayard.worker import Lora, Model, ModelConfig

from ..tiny import write_adapter, write_model

PREFIX = "base_model.model.model.layers.1.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = Model(ModelConfig.from_directory(write_model(tmp_path_factory.mktemp("refused") / "base")))
    model.load(devices="cpu")
    return model


@pytest.fixture(scope="module")
def good(model: Model) -> Path:
    return write_adapter(model.config.path.parent / "good", model.config.path)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "adapter")


def refuse(model: Model, path: Path, error: type[LorayardError], *words: str) -> None:
    """Loading must raise `error`, naming `words` in one line."""
    with pytest.raises(error) as raised:
        Lora.from_directory(model, path)
    message = str(raised.value)
    assert type(raised.value) is error and "\n" not in message
    assert all(word in message for word in words), message


KEYS: list[tuple[dict[str, Any], type[LorayardError], str]] = [
    ({"use_dora": True}, NotSupported, "use_dora"),
    ({"bias": "lora_only"}, NotSupported, "'lora_only'"),
    ({"lora_bias": True}, NotSupported, "lora_bias"),
    ({"modules_to_save": ["lm_head"]}, NotSupported, "modules_to_save"),
    ({"fan_in_fan_out": True}, NotSupported, "fan_in_fan_out"),
    ({"layer_replication": [[0, 2]]}, NotSupported, "layer_replication"),
    ({"trainable_token_indices": [1]}, NotSupported, "trainable_token_indices"),
    ({"alora_invocation_tokens": [1, 2]}, NotSupported, "alora_invocation_tokens"),
    ({"use_qalora": True}, NotSupported, "use_qalora"),
    ({"a_key_of_the_future": 1}, NotSupported, "a_key_of_the_future"),
    ({"init_lora_weights": "pissa_niter_4"}, NotSupported, "'pissa_niter_4'"),
    ({"init_lora_weights": "loftq"}, NotSupported, "'loftq'"),
    ({"init_lora_weights": ["gaussian"]}, NotSupported, "init_lora_weights"),
    ({"peft_type": "IA3"}, NotSupported, "'IA3'"),
    ({"peft_type": None}, AdapterError, "has no peft_type"),
    ({"r": None}, AdapterError, "has no r"),
    ({"r": 0}, AdapterError, "r must be between"),
    ({"r": "8"}, AdapterError, "r must be a whole number"),
    ({"r": 5}, AdapterError, "has shape [4, 96], expected [5, 96]"),
    ({"lora_alpha": None}, AdapterError, "has no lora_alpha"),
    ({"lora_alpha": float("nan")}, AdapterError, "lora_alpha must be finite"),
    ({"lora_alpha": 1e300}, AdapterError, "not finite"),
    ({"rank_pattern": {"q_proj": 3}}, AdapterError, "another rank"),
    ({"rank_pattern": {"q_proj": "x"}}, AdapterError, "q_proj must be a whole number"),
    ({"rank_pattern": {"(a+)+$": 4}}, NotSupported, "'(a+)+$'"),
    ({"alpha_pattern": {"q_proj": True}}, AdapterError, "q_proj must be a number"),
]


@pytest.mark.parametrize(("keys", "error", "words"), KEYS)
def test_keys_of_the_config(
    keys: dict[str, Any], error: type[LorayardError], words: str, model: Model, folder: Path
) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | keys))
    refuse(model, folder, error, words)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_config_that_is_no_object(text: str, model: Model, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(text)
    refuse(model, folder, AdapterError, "adapter_config.json")


def test_no_folder_and_no_weights(model: Model, folder: Path) -> None:
    refuse(model, folder / "absent", AdapterError, "adapter_config.json cannot be read")
    (folder / WEIGHTS).unlink()
    refuse(model, folder, AdapterError, f"holds neither {WEIGHTS} nor adapter_model.bin")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_weights(keep: int, model: Model, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    refuse(model, folder, AdapterError, WEIGHTS, "not a whole safetensors file")


class Hostile:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit(99)",))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", pickle.dumps(Hostile()), pickle.dumps({"a": 1}), b"PK\x03\x04" + bytes(50)],
    ids=["empty", "cut", "code", "numbers", "zip"],
)
def test_bin_files_that_are_not_tensors(data: bytes, model: Model, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(data)
    refuse(model, folder, AdapterError, "adapter_model.bin")


def test_a_bin_file_that_runs_code_or_holds_lists(model: Model, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    sparse = {"x": torch.eye(2).to_sparse()}
    for content in ({"x": Hostile()}, [torch.ones(1)], {"x": torch.ones(1, dtype=torch.int64)}, sparse):
        torch.save(content, folder / "adapter_model.bin")
        refuse(model, folder, AdapterError, "adapter_model.bin")


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


A, B = f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"
OTHER = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[LorayardError], str]] = {
    "no A": (lambda t: t.pop(A), AdapterError, "model.layers.1.self_attn.q_proj has no lora_A"),
    "no B": (lambda t: t.pop(B), AdapterError, "model.layers.1.self_attn.q_proj has no lora_B"),
    "nothing": (lambda t: t.clear(), AdapterError, "holds no LoRA tensors"),
    "other base": (lambda t: t.update({A: torch.zeros(4, 65)}), AdapterError, "[4, 65], expected [4, 64]"),
    "other rank": (lambda t: t.update({B: torch.zeros(64, 5)}), AdapterError, "[64, 5], expected [64, 4]"),
    "flat": (lambda t: t.update({B: torch.zeros(64)}), AdapterError, "[64], expected [64, 4]"),
    "more layers": (lambda t: rename(t, A, OTHER), AdapterError, "no linear model.layers.7.self_attn.q_proj"),
    "dtype": (lambda t: t.update({A: torch.zeros(4, 64, dtype=torch.int8)}), NotSupported, f"{A} is I8"),
    "nan": (lambda t: t[A].fill_(torch.nan), AdapterError, "not finite"),
    "inf": (lambda t: t[B].fill_(torch.inf), AdapterError, "not finite"),
    "two": (lambda t: t.update({A.replace("A.", "A.second."): t[A].clone()}), NotSupported, "two adapters"),
    "dora": (lambda t: t.update({f"{PREFIX}.lora_magnitude_vector.weight": torch.ones(64)}), NotSupported, "magnitude"),
    "bias": (lambda t: t.update({f"{PREFIX}.bias": torch.ones(64)}), NotSupported, f"{PREFIX}.bias"),
    "head": (lambda t: rename(t, A, "base_model.model.lm_head.lora_A.weight"), NotSupported, "lm_head"),
    "embedding": (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 160)}),
                  NotSupported, "lora_embedding_A"),
    "full head": (lambda t: rename(t, A, "base_model.model.lm_head.weight"), NotSupported, "lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", CHANGES)
def test_tensors(name: str, kind: str, model: Model, folder: Path) -> None:
    change, error, words = CHANGES[name]
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    (folder / WEIGHTS).unlink()
    if kind == "safetensors":
        save_file(tensors, folder / WEIGHTS)
        refuse(model, folder, error, WEIGHTS, words)
        return
    torch.save(tensors, folder / "adapter_model.bin")
    if name == "dtype":
        error, words = AdapterError, "must map names to tensors of F16, BF16, F32"
    refuse(model, folder, error, "adapter_model.bin", words)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), True])
def test_a_scaling_that_is_no_number(scaling: float, model: Model, good: Path) -> None:
    with pytest.raises(UsageError, match="lora_scaling"):
        Lora.from_directory(model, good, lora_scaling=scaling)
