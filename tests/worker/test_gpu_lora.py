"""Slots on CUDA: graphs that outlive their adapters, and rows that do not know of each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorayard.demo import ADAPTERS, BASE
from lorayard.kernels.lora import Tiles
from lorayard.kernels.lora_tiles import COLUMNS, Tables, count_tiles, fill_tables
from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.lora.bank import LoraBank
from lorayard.worker.lora.prepared import Prepared
from lorayard.worker.models.batch import LoraRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
NAMES = tuple(f"model.layers.0.self_attn.{last}_proj" for last in "qkv")


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model(ModelConfig.from_directory(BASE))
    model.load(devices="cuda:0")
    return model


@pytest.fixture(scope="module")
def loras(model: Model) -> list[Lora]:
    return [Lora.from_directory(model, ADAPTERS / name) for name in ("bullets", "json", "shout")]


def expected(loras: list[Lora | None], scales: list[float], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """float64 [T, N]."""
    parts = list(y.double().cpu().split([len(loras_b(loras, name)) for name in NAMES], 1))
    for name, part in zip(NAMES, parts, strict=True):
        for i, (lora, scale) in enumerate(zip(loras, scales, strict=True)):
            if lora and name in lora.tensors:
                a, b = (half.double() for half in lora.tensors[name])
                part[i] += b @ (a @ x[i].double().cpu()) * scale
    return torch.cat(parts, 1)


def loras_b(loras: list[Lora | None], name: str) -> torch.Tensor:
    return next(lora.tensors[name][1] for lora in loras if lora and name in lora.tensors)


def close(got: torch.Tensor, value: torch.Tensor) -> bool:
    return float((got.double().cpu() - value).norm() / value.norm()) < 5e-4


def test_a_graph_captured_once_is_right_for_any_adapters(model: Model, loras: list[Lora]) -> None:
    bank, rows = LoraBank(model, slots=2), 5
    assert bank.graphable(()) and bank.width == 16
    x = torch.randn(rows, model.config.hidden_size, device="cuda").half()
    base = torch.randn(rows, sum(len(loras_b(list(loras), name)) for name in NAMES), device="cuda").half()
    tiles = count_tiles(rows, 2)
    host = Tables(np.empty(tiles, np.int32), np.empty((tiles, COLUMNS), np.int32))
    scales = torch.zeros(rows, 16, device="cuda")
    device = Tiles(*(torch.full(each.shape, -1, dtype=torch.int32, device="cuda") for each in host), scales)  # type: ignore[call-arg]
    prepared = Prepared((), (), device)
    bank.apply(NAMES, x, base.clone(), prepared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bank.apply(NAMES, x, base.clone(), prepared)
    for pair, slots in (((0, 1), [0, 1, -1, 1, 0]), ((2, 0), [1, 1, 1, 1, 1]), ((1, 2), [-1, -1, 0, -1, 1])):
        placed = [bank.place((loras[each],)) for each in pair]
        used = [placed[slot] if slot >= 0 else -1 for slot in slots]
        fill_tables(np.array(used, np.int32), host)
        for there, here in zip((device.slots, device.rows), host, strict=True):
            there.copy_(torch.from_numpy(here))
        factors = torch.rand(rows)
        scales.copy_(factors[:, None].expand(-1, 16))
        bank.receive(placed)
        graph.replay()
        mine = [loras[pair[placed.index(slot)]] if slot >= 0 else None for slot in used]
        assert close(y, expected(mine, factors.tolist(), x, base))


def test_the_bits_of_a_row_are_its_own_and_torch_agrees(
    model: Model, loras: list[Lora], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = LoraBank(model, slots=4)
    slots = [bank.place(each) for each in ((loras[0],), (loras[1],), (loras[0], loras[2]))]
    x = torch.randn(200, model.config.hidden_size, device="cuda").half()
    base = torch.randn(200, sum(len(loras_b(list(loras), name)) for name in NAMES), device="cuda").half()
    uses = []
    for i, (slot, scales) in enumerate(zip(slots, ((1.0,), (0.5,), (2.0, -1.0)), strict=True)):
        rows = torch.arange(i, 190, 4)
        uses.append(LoraRows(slot, rows, bank.rank_scales(slot, scales).expand(len(rows), -1)))
    device = torch.device("cuda", 0)
    together = bank.apply(NAMES, x, base.clone(), bank.prepare(tuple(uses), device))
    for use in uses:
        alone = bank.prepare((LoraRows(use.slot, torch.tensor([0]), use.scales[:1]),), device)
        row = int(use.rows[3])
        assert torch.equal(bank.apply(NAMES, x[row : row + 1], base[row : row + 1].clone(), alone)[0], together[row])
    monkeypatch.setenv("LORAYARD_KERNELS", "torch")
    value = bank.apply(NAMES, x, base.clone(), bank.prepare(tuple(uses), device)).double().cpu()
    assert close(together, value) and torch.equal(together[3::4], base[3::4])
