"""Adapter folders that must be refused in one sentence that names the file and the tensor or key."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorayard.shared.errors import AdapterError, LorayardError, NotSupported, UsageError
from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.lora.pickled import MAX_PICKLE, BinFile

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
    ({"use_dora": True}, AdapterError, "has no lora_magnitude_vector"),
    ({"use_dora": True, "lora_bias": True}, AdapterError, "no lora_bias together with use_dora"),
    ({"bias": "vera_only"}, NotSupported, "'vera_only'"),
    ({"lora_bias": True}, AdapterError, "has no lora_B.bias"),
    ({"lora_bias": "yes"}, AdapterError, "lora_bias must be true or false"),
    ({"modules_to_save": ["lm_head"]}, AdapterError, "no tensor for lm_head, which modules_to_save names"),
    ({"modules_to_save": ["norm"]}, NotSupported, "modules_to_save names 'norm'"),
    ({"modules_to_save": [".*"]}, NotSupported, "modules_to_save '.*'"),
    ({"layer_replication": [[0, 2]]}, NotSupported, "layer_replication"),
    ({"trainable_token_indices": [1]}, AdapterError, "which trainable_token_indices names"),
    ({"trainable_token_indices": [1, 1]}, AdapterError, "different ids"),
    ({"trainable_token_indices": {"q_proj": [1]}}, NotSupported, "trainable_token_indices names 'q_proj'"),
    ({"alora_invocation_tokens": [1, 2]}, NotSupported, "alora_invocation_tokens"),
    ({"use_qalora": True}, NotSupported, "use_qalora"),
    ({"arrow_config": {"top_k": 3}}, NotSupported, "arrow_config"),
    ({"kasa_config": {"a": 1}}, NotSupported, "kasa_config"),
    ({"velora_config": {"scale": 1.0}}, NotSupported, "velora_config"),
    ({"monteclora_config": {"num_samples": 8}}, NotSupported, "monteclora_config"),
    ({"use_bdlora": {"nblocks": 2}}, NotSupported, "use_bdlora"),
    ({"megatron_config": {"a": 1}}, NotSupported, "megatron_config"),
    ({"target_parameters": ["experts"]}, NotSupported, "target_parameters"),
    ({"a_key_of_the_future": 1}, NotSupported, "a_key_of_the_future"),
    ({"target_modules": None}, AdapterError, "has no target_modules"),
    ({"target_modules": [1]}, AdapterError, "target_modules must be a text or a list of texts"),
    ({"target_modules": ["c_attn"]}, AdapterError, "names no module of the base"),
    ({"target_modules": r".*\.0\..*_proj"}, AdapterError, "x 1 layer, which adapter_config.json does not target"),
    ({"target_modules": "(.*)\\1"}, NotSupported, "uses groupref"),
    ({"target_modules": "(" * 5000}, NotSupported, "is no regular expression"),
    ({"exclude_modules": ["up_proj"]}, AdapterError, "LoRA for up_proj x 2 layers, which adapter_config.json does not"),
    ({"layers_to_transform": [0]}, AdapterError, "x 1 layer, which adapter_config.json does not target"),
    ({"layers_to_transform": ["0"]}, AdapterError, "layers_to_transform must be"),
    ({"layers_pattern": "(a+)+$"}, NotSupported, "layers_pattern '(a+)+$'"),
    ({"target_modules": "all-linear", "exclude_modules": ".*"}, AdapterError, "names no module of the base"),
    ({"init_lora_weights": "mica"}, NotSupported, "'mica'"),
    ({"init_lora_weights": "lora_ga"}, NotSupported, "'lora_ga'"),
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
    ({"rank_pattern": {"(a?){65000}": 4}}, NotSupported, "takes too long to match"),
    ({"alpha_pattern": {"(?=q_proj)": 4}}, NotSupported, "uses assert"),
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
    for content in ({"x": Hostile()}, [torch.ones(1)], {"x": torch.ones(1, dtype=torch.complex64)}, sparse):
        torch.save(content, folder / "adapter_model.bin")
        refuse(model, folder, AdapterError, "adapter_model.bin")


def test_changed_bin_files_are_refused_or_read(tmp_path: Path) -> None:
    """Bytes of the pickle and of the archive replaced, lost and doubled."""
    path, draw = tmp_path / "adapter_model.bin", random.Random(6)
    torch.save({f"model.layers.{i}.lora_A.weight": torch.randn(4, 8) for i in range(5)}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    outcomes = []
    for turn in range(600):
        if turn % 3:
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in files.items():
                    archive.writestr(name, changed(draw, data) if name.endswith("data.pkl") else data)
        else:
            path.write_bytes(changed(draw, whole))
        try:
            file = BinFile(path)
            outcomes.append([file.read(name).shape for name, entry in file.entries.items() if entry.shape == (4, 8)])
        except AdapterError as reason:
            assert str(path) in str(reason) and "\n" not in str(reason)
    assert 0 < len(outcomes) < 300


def changed(draw: random.Random, data: bytes) -> bytes:
    """One to six small changes."""
    buffer = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        at, size = draw.randrange(len(buffer)), draw.randint(1, 20)
        buffer[at : at + draw.choice((0, size))] = draw.choice((b"", bytes([draw.randrange(256)]), buffer[:size]))
    return bytes(buffer)


PROGRAMS = {
    "many values": b"N" * (MAX_PICKLE - 3) + b".",
    "deep value": b")" + b"\x85" * (MAX_PICKLE - 8) + b"N}s.",
    "deep key": b"})" + b"\x85" * (MAX_PICKLE - 8) + b"Ns.",
    "deep function": b")" + b"\x85" * (MAX_PICKLE - 8) + b")R.",
    "too long": b"N" * MAX_PICKLE + b".",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_would_cost_much(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + PROGRAMS[name])
    with pytest.raises(AdapterError, match="x.bin is not a plain file of tensors"):
        BinFile(tmp_path / "x.bin")


def test_an_archive_of_very_many_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        for i in range(12_000):
            archive.writestr(f"x/{i}", b"")
    with pytest.raises(AdapterError, match="its list of files has"):
        BinFile(tmp_path / "x.bin")


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
    "dora": (lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(64)}), AdapterError, "magnitude_vector"),
    "bias": (lambda t: t.update({f"{PREFIX}.bias": torch.ones(64)}), AdapterError, f"{PREFIX}.bias contradicts"),
    "B bias": (lambda t: t.update({f"{PREFIX}.lora_B.bias": torch.ones(64)}), AdapterError, "B.bias contradicts"),
    "head": (lambda t: rename(t, A, "base_model.model.lm_head.lora_A.weight"), AdapterError, "LoRA for lm_head, which"),
    "embedding": (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 160)}),
                  AdapterError, "LoRA for model.embed_tokens, which"),
    "small head": (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(4, 64)}),
                   AdapterError, "[4, 64], expected [160, 64]"),
    "norm": (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}), NotSupported, "norm.weight"),
    "weight": (lambda t: t.update({f"{PREFIX}.base_layer.weight": torch.ones(64, 64)}), NotSupported, "base_layer.w"),
    "other name": (lambda t: rename(t, A, A.replace("lora_A", "lora_C")), NotSupported, "lora_C"),
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
    refuse(model, folder, error, "adapter_model.bin", words)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), True])
def test_a_scaling_that_is_no_number(scaling: float, model: Model, good: Path) -> None:
    with pytest.raises(UsageError, match="lora_scaling"):
        Lora.from_directory(model, good, lora_scaling=scaling)
