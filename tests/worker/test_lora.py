"""Adapters from every way PEFT writes them, and the slots of the bank."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorayard.shared.errors import AdapterError, SlotBusy, UsageError
from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.lora.bank import LoraBank
from lorayard.worker.lora.folders import adapter_digest
from lorayard.worker.models.batch import LoraRows

from ..tiny import write_adapter, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = Model(ModelConfig.from_directory(write_model(tmp_path_factory.mktemp("lora") / "base")))
    model.load(devices="cpu")
    return model


@pytest.fixture(scope="module")
def loras(model: Model) -> list[Lora]:
    """Six adapters a to f; b has other ranks at some linears."""
    base = model.config.path
    patterns = {"b": {"q_proj": 9, "v_proj": 1}}
    paths = [
        write_adapter(base.parent / name, base, seed, r=4, rank_pattern=patterns.get(name, {}))
        for seed, name in enumerate("abcdef")
    ]
    return [Lora.from_directory(model, path) for path in paths]


def test_ranks_name_and_digest(loras: list[Lora], model: Model) -> None:
    a, b = loras[:2]
    assert (a.name, a.max_rank, b.max_rank, len(a.ranks)) == ("a", 4, 9, 14)
    assert b.ranks["model.layers.1.self_attn.v_proj"] == 1
    assert a.digest == adapter_digest(model.config.path.parent / "a") != b.digest


def test_bin_and_named_keys_read_as_the_same_adapter(loras: list[Lora], model: Model, tmp_path: Path) -> None:
    source = model.config.path.parent / "b"
    weights = load_file(source / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in weights.items()}
    for folder, write in (
        ("bin", lambda path: torch.save(weights, path / "adapter_model.bin")),
        ("named", lambda path: save_file(named, path / "adapter_model.safetensors")),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
        write(tmp_path / folder)
        got = Lora.from_directory(model, tmp_path / folder)
        assert got.tensors.keys() == loras[1].tensors.keys()
        for module, halves in got.tensors.items():
            assert all(torch.equal(x, y) for x, y in zip(halves, loras[1].tensors[module], strict=True))


def test_safetensors_wins_over_bin(loras: list[Lora], model: Model, tmp_path: Path) -> None:
    source = model.config.path.parent / "a"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"never read")
    assert Lora.from_directory(model, tmp_path).ranks == loras[0].ranks


def test_harmless_keys_are_let_pass(model: Model, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "x", model.config.path, lora_dropout=0.1, init_lora_weights="gaussian")
    config = json.loads((path / "adapter_config.json").read_text())
    config |= {"a_new_key_that_is_off": False, "base_model_name_or_path": "elsewhere/model"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    assert Lora.from_directory(model, path).max_rank == 4


def test_a_model_must_be_loaded_first(model: Model) -> None:
    with pytest.raises(UsageError, match="load the model"):
        Lora.from_directory(Model(model.config), model.config.path.parent / "a")


def test_a_combination_is_found_in_any_order_and_kept(loras: list[Lora], model: Model) -> None:
    a, b, *_ = loras
    bank = LoraBank(model, slots=2)
    assert (bank.find((a,)), bank.combinations) == (None, [None, None])
    assert (bank.place((b, a)), bank.place((a, b)), bank.find((b, a)), bank.place((a,))) == (0, 0, 0, 1)
    assert bank.combinations == [(f"a@{a.digest[:8]}", f"b@{b.digest[:8]}"), (f"a@{a.digest[:8]}",)]
    assert bank.swaps == 0
    assert bank.rank_scales(0, (0.5, -2.0)).tolist() == [0.5] * 4 + [-2.0] * 9 + [0.0] * 3


def test_a_pinned_slot_never_changes_and_the_longest_unused_goes_first(loras: list[Lora], model: Model) -> None:
    a, b, c, d, *_ = loras
    bank = LoraBank(model, slots=2)
    bank.pin(bank.place((a,)))
    bank.pin(bank.place((b,)))
    for slot in (None, 0, 1):
        with pytest.raises(SlotBusy):
            bank.place((c,), slot)
    bank.unpin(1)
    assert (bank.place((c,)), bank.find((b,)), bank.swaps) == (1, None, 1)
    bank.unpin(0)
    assert (bank.place((a,)), bank.place((d,))) == (0, 1)
    assert (bank.place((b,), slot=1), bank.swaps) == (1, 3)


def test_random_use_of_the_bank_keeps_every_pinned_slot(loras: list[Lora], model: Model) -> None:
    draw = random.Random(4)
    bank = LoraBank(model, slots=3)
    pinned: list[tuple[int, tuple[Lora, ...]]] = []
    for _ in range(400):
        if pinned and draw.random() < 0.5:
            slot, _ = pinned.pop(draw.randrange(len(pinned)))
            bank.unpin(slot)
        else:
            wanted = tuple(draw.sample(loras, draw.randint(1, 2)))
            try:
                slot = bank.place(wanted)
            except SlotBusy:
                assert len({slot for slot, _ in pinned}) == 3
                continue
            bank.pin(slot)
            pinned.append((slot, wanted))
        assert all(bank.find(wanted) == slot for slot, wanted in pinned)


def test_ranks_that_do_not_fit_and_no_combination(loras: list[Lora], model: Model) -> None:
    a, b, *_ = loras
    with pytest.raises(AdapterError, match="sum to 13; a slot holds 12"):
        LoraBank(model, max_rank=12).place((a, b))
    for none in ((), (a, a)):
        with pytest.raises(AdapterError, match="different names"):
            LoraBank(model).place(none)
    with pytest.raises(UsageError):
        LoraBank(model, slots=0)


def test_linears_side_by_side_have_the_bits_of_each(loras: list[Lora], model: Model) -> None:
    bank = LoraBank(model, slots=2)
    slot, rows = bank.place(tuple(loras[:2])), torch.tensor([1, 2, 4])
    use = LoraRows(slot, rows, bank.rank_scales(slot, (0.5, -2.0)).expand(len(rows), -1))
    prepared = bank.prepare((use,), torch.device("cpu"))
    names = tuple(f"model.layers.1.self_attn.{last}_proj" for last in "qkv")
    shapes = [model.linears[name].shape for name in names]
    x, ys = torch.randn(6, shapes[0].in_features), [torch.randn(6, shape.out_features) for shape in shapes]
    joined = bank.apply(names, x, torch.cat(ys, 1), prepared)
    alone = [bank.apply(name, x, y.clone(), prepared) for name, y in zip(names, ys, strict=True)]
    assert torch.equal(joined, torch.cat(alone, 1)) and not torch.equal(alone[0][rows], ys[0][rows])
    assert torch.equal(joined[[0, 3, 5]], torch.cat(ys, 1)[[0, 3, 5]])
