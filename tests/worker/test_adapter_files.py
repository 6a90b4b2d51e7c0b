"""Adapters in every spelling of their files, and what `lorayard adapters check` says of them."""

from __future__ import annotations

import collections
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorayard.shared.cli import run
from lorayard.shared.errors import AdapterError, NotSupported
from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.lora.contents import Contents
from lorayard.worker.lora.pickled import BinFile

from ..features import FEATURES, write_feature
from ..tiny import reference, reference_logits, relative, write_model

PROMPT = list(range(5, 40))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    base = write_model(tmp_path_factory.mktemp("files") / "base", attention_bias=True)
    model = Model(ModelConfig.from_directory(base))
    model.load(devices="cpu")
    return model


@pytest.fixture(scope="module")
def everything(model: Model) -> dict[str, Path]:
    """Adapters that have every kind of tensor between them."""
    names = ("dora everywhere", "lora_bias, bias", "own embedding and head", "tokens of both")
    return {
        name: write_feature(model.config.path.parent / f"a{i}", model.config.path, name) for i, name in enumerate(names)
    }


def rewrite(source: Path, path: Path, change: Any = dict, **config: Any) -> Path:
    """The adapter with its tensors changed, and keys of its config."""
    shutil.copytree(source, path)
    tensors = change({name: tensor.clone() for name, tensor in load_file(path / WEIGHTS).items()})
    save_file(tensors, path / WEIGHTS)
    said = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(said | config))
    return path


def with_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The name inside the key, as training checkpoints have it, and old spellings of DoRA and saved modules."""
    renamed = {}
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2]
        if "base_layer" in name:
            renamed[name] = tensor
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            renamed[name.removesuffix("weight") + "modules_to_save.default.weight"] = tensor
        elif last in ("weight", "bias") and "lora_" in name:
            renamed[f"{name.removesuffix(last)}default.{last}"] = tensor
        elif last == "lora_magnitude_vector":
            renamed[f"{name}.default.weight"] = tensor
        elif last == "bias":
            renamed[name] = tensor
        else:
            renamed[f"{name}.default"] = tensor
    return renamed


SPELLINGS = {
    "no prefix": lambda tensors: {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()},
    "names": with_names,
    "old biases": lambda tensors: {name.replace("base_layer.bias", "bias"): t for name, t in tensors.items()},
    "old magnitudes": lambda tensors: {
        name.replace("magnitude_vector", "magnitude_vector.weight"): t for name, t in tensors.items()
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_older_spellings_are_read_as_the_same(
    spelling: str, model: Model, everything: dict[str, Path], tmp_path: Path
) -> None:
    for source in everything.values():
        expected = model.logits(PROMPT, [Lora.from_directory(model, source)])
        other = rewrite(source, tmp_path / source.name, SPELLINGS[spelling])
        assert torch.equal(model.logits(PROMPT, [Lora.from_directory(model, other)]), expected)


def test_bin_files_are_read_as_the_same(model: Model, everything: dict[str, Path], tmp_path: Path) -> None:
    for source in everything.values():
        expected = model.logits(PROMPT, [Lora.from_directory(model, source)])
        path = shutil.copytree(source, tmp_path / source.name)
        (path / WEIGHTS).unlink()
        torch.save(load_file(source / WEIGHTS), path / "adapter_model.bin")
        assert torch.equal(model.logits(PROMPT, [Lora.from_directory(model, path)]), expected)


def test_every_kind_of_tensor_that_torch_saves(tmp_path: Path) -> None:
    base = torch.randn(10, 12)
    state = collections.OrderedDict(
        half=torch.randn(3, 4).half(), brain=torch.randn(5).bfloat16(), turned=base.T[2:5], part=base[1:3],
        parameter=torch.nn.Parameter(torch.randn(3)), steps=torch.randn(1, 300)[:, ::3], scalar=torch.tensor(2.0),
    )  # fmt: skip
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    for content in (state, dict(state), {f"k{i}": torch.randn(2) for i in range(2500)}):
        torch.save(content, tmp_path / "adapter_model.bin")
        file = BinFile(tmp_path / "adapter_model.bin")
        assert list(file.entries) == list(content)
        for name, tensor in content.items():
            assert torch.equal(file.read(name), tensor.detach()), name


def test_a_bin_file_from_before_zips_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterError, match=r"it is no zip file.*; .*\.save_pretrained\(NEW\) writes it as safetensors"):
        BinFile(tmp_path / "old.bin")


def test_a_base_weight_beside_lora_is_dropped_if_it_is_ours_and_used_if_not(model: Model, tmp_path: Path) -> None:
    source = write_feature(tmp_path / "source", model.config.path, "embedding and head")
    assert not Lora.from_directory(model, source).changes
    other = rewrite(source, tmp_path / "other", lambda tensors: {
        name: tensor * 1.5 if "base_layer" in name else tensor for name, tensor in tensors.items()
    })  # fmt: skip
    lora = Lora.from_directory(model, other)
    assert lora.changes.keys() == {"model.embed_tokens", "lm_head"} and lora.alone
    expected = reference_logits(reference(model.config.path, [(other, 1.0)]), PROMPT)
    assert relative(model.logits(PROMPT, [lora]), expected) < 1e-3


def test_another_weight_for_what_is_both_embedding_and_head_is_refused(tmp_path: Path) -> None:
    model = Model(ModelConfig.from_directory(write_model(tmp_path / "base", tie_word_embeddings=True)))
    model.load(devices="cpu")
    source = write_feature(tmp_path / "source", model.config.path, "embedding")
    other = rewrite(source, tmp_path / "other", lambda tensors: {
        name: tensor * 1.5 if "base_layer" in name else tensor for name, tensor in tensors.items()
    })  # fmt: skip
    with pytest.raises(NotSupported, match="another weight for model.embed_tokens, which is both"):
        Lora.from_directory(model, other)


def test_modules_without_tensors_have_no_effect_and_a_note(model: Model, tmp_path: Path) -> None:
    source = write_feature(tmp_path / "source", model.config.path, "linears")
    less = rewrite(source, tmp_path / "less", lambda tensors: {
        name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name
    })  # fmt: skip
    note = "down_proj, gate_proj, up_proj x 1 layer: targeted, but there are no tensors; no effect there, as in PEFT"
    assert Contents.of(less, model.config).notes == [note]
    expected = reference_logits(reference(model.config.path, [(less, 1.0)]), PROMPT)
    assert relative(model.logits(PROMPT, [Lora.from_directory(model, less)]), expected) < 1e-3
    config = json.loads((less / "adapter_config.json").read_text()) | {"init_lora_weights": False}
    (less / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="where init_lora_weights makes them random"):
        Lora.from_directory(model, less)


@pytest.mark.parametrize(
    "name", ["linears", "much", "dora, bias", "own head", "tokens of both", "embedding", "lora_bias"]
)
def test_bytes_in_a_slot_are_known_from_the_headers(name: str, model: Model, tmp_path: Path) -> None:
    contents = Contents.of(write_feature(tmp_path / "a", model.config.path, name), model.config)
    lora = Lora.from_directory(model, tmp_path / "a")
    bank, _ = lora.resident(model, [(lora, 1.0)], torch.arange(1))
    slot = bank._slots[0]
    tensors = [half for module, packed in slot.stacked.items() for half in packed[module]]
    tensors += [tensor for changes in slot.changes.values() for _, change in changes for tensor in change.tensors()]
    assert contents.slot_bytes(itemsize=4) == sum(tensor.nbytes for tensor in tensors)


def test_check_says_what_it_found(model: Model, everything: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    base, path = str(model.config.path), str(everything["dora everywhere"])
    assert run(["adapters", "check", base, path, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["parity"] < 1e-4
    assert said["modules"] == "lm_head, model.embed_tokens, q_proj, v_proj x 2 layers"
    assert (said["rank"], said["scaling"]) == ("3 to 7", "alpha / sqrt(r) = 3.02372 to 4.6188")
    assert said["features"] == ["rank_pattern", "use_rslora", "use_dora", "embed_tokens", "lm_head"]
    assert said["bytes_on_disk"] == Path(path, WEIGHTS).stat().st_size
    assert run(["adapters", "check", base, path, "--no-parity"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert f"digest: {said['digest']}" in lines and f"bytes in a slot: {said['bytes_in_a_slot']:,}" in lines
    assert not any(line.startswith("parity") for line in lines)


def test_check_refuses_with_one_sentence_and_status_four(
    model: Model, everything: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = everything["own embedding and head"]
    arrow = rewrite(source, tmp_path / "arrow", arrow_config={"top_k": 2})
    wide = rewrite(source, tmp_path / "wide", rank_pattern={"q_proj": 300})
    for path, words in (
        (arrow, "arrow_config is set"),
        (wide, "another rank"),
        (tmp_path / "absent", "cannot be read"),
    ):
        assert run(["adapters", "check", str(model.config.path), str(path), "--no-parity"]) == 4
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("lorayard: ") and words in err and err.count("\n") == 1


def test_check_without_peft_says_so(
    model: Model, everything: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lorayard.worker.lora.parity.find_spec", lambda name: None if name == "peft" else sys)
    assert run(["adapters", "check", str(model.config.path), str(everything["tokens of both"])]) == 0
    assert "parity: not measured: peft not installed" in capfd.readouterr().out


def test_check_fails_where_the_figures_differ(
    model: Model, everything: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lorayard.worker.lora.check.measure", lambda base, adapter: 0.25)
    assert run(["adapters", "check", str(model.config.path), str(everything["tokens of both"])]) == 1
    assert "parity: logits differ from peft's by 2.5e-01, MORE THAN 0.001" in capfd.readouterr().out


def test_the_features_have_every_key_that_is_read() -> None:
    from lorayard.worker.lora.config import READ

    used = {key for keys in FEATURES.values() for key in keys} | {"peft_type"}
    assert READ <= used
