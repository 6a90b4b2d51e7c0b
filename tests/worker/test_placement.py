"""Layers over devices: the plan, the budgets that it is made for, and the model that it places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorayard.demo import ADAPTERS, BASE
from lorayard.shared.errors import LorayardError, ModelError, UsageError
from lorayard.worker import Cache, Lora, Model, ModelConfig
from lorayard.worker.models.devices import limited, named, over
from lorayard.worker.models.memory import Needs, Wish, advice
from lorayard.worker.models.model import checkpoint, needs
from lorayard.worker.models.placement import Budget, Part, find_budgets, plan

from ..tiny import write_model

A, B = torch.device("cuda:0"), torch.device("cuda:1")
MIB = 1 << 20
TOKENS = list(range(3, 300))


def parts(*sizes: int) -> list[Part]:
    return [Part(str(i), size) for i, size in enumerate(sizes)]


def test_a_device_is_filled_before_the_next_is_begun() -> None:
    assert plan(parts(3, 3, 3, 1), [Budget(A, 7), Budget(B, None)]).devices() == [A, A, B, B]
    assert plan(parts(3, 1), [Budget(A, 2), Budget(B, 4)]).devices() == [B, B]
    short = plan(parts(3, 3), [Budget(A, 3), Budget(B, 2)])
    assert not short.fits and short.places == (0,)
    with pytest.raises(ModelError, match="cuda:0 0.0 MiB, cuda:1 0.0 MiB; make the cache smaller"):
        short.devices()


def test_only_memory_that_was_found_has_to_hold_the_workspace() -> None:
    assert plan(parts(3), [Budget(A, 5, stated=True)], workspace=3).fits
    assert not plan(parts(3), [Budget(A, 5, stated=False)], workspace=3).fits
    assert plan(parts(3), [Budget(A, 6, stated=False)], workspace=3).fits


def test_devices_as_people_write_them() -> None:
    assert named("cuda:1=20GiB,cuda=512mb") == [("cuda:1", 20 << 30), ("cuda:0", 512 * 10**6)]
    assert named({"cpu:0": "1MiB", "cpu:1": "1.5KB"}) == [("cpu:0", MIB), ("cpu:1", 1500)]
    assert named(["cpu", "cpu=7"]) == [("cpu", None), ("cpu", 7)]
    assert over("auto", "20,7.5") == ["cuda:0=20GiB", "cuda:1=7.5GiB"]
    assert over("cuda:3,cuda:1", "1,2") == ["cuda:3=1GiB", "cuda:1=2GiB"]
    assert over("cpu", None) == "cpu" and limited(["cpu"], "3") == ["cpu=3GiB"]


@pytest.mark.parametrize(
    ("devices", "sentence"),
    [
        ("tpu", "device 'tpu' must be cpu, cuda or cuda:N"),
        ("cuda:0,cuda", "names a GPU twice: cuda:0, cuda:0"),
        ([], "names no device"),
        ("cpu=much", "must be a size such as 20GiB, not 'much'"),
        ({"cpu": "-1"}, "must be a size"),
        ("cpu,", "device ''"),
        ("cuda:99", "there is no device cuda:99"),
    ],
)
def test_what_is_no_device(devices: str | list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        find_budgets(devices)


@pytest.mark.parametrize("sizes", ["20,20", "20,x,20", "-1,2,3", ""])
def test_what_is_no_split(sizes: str) -> None:
    with pytest.raises(UsageError, match="--gpu-split"):
        limited(["cuda:0", "cuda:1", "cuda:2"], sizes)


def test_a_gpu_that_is_absent_can_be_planned_with() -> None:
    assert find_budgets("cuda:98=20GiB", absent=True) == [Budget(torch.device("cuda:98"), 20 << 30)]
    with pytest.raises(UsageError, match="there is no device"):
        find_budgets("cuda:98", absent=True)


def test_layers_over_two_devices_give_the_very_bits_of_one(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", num_hidden_layers=5, hidden_size=128)
    alone, split = (Model(ModelConfig.from_directory(base)) for _ in range(2))
    alone.load(devices="cpu")
    cache = Cache(split, 512, "fp32")
    done: list[int] = []
    split.load(cache, {"cpu:0": "1MiB", "cpu:1": "3MiB"}, lambda i, _: done.append(i))
    devices = [str(device) for device in split.layer_devices]
    assert set(devices) == {"cpu:0", "cpu:1"} and devices == sorted(devices) and len(done) == 7
    assert all(sum(pool.nbytes for pool in cache[i]) == cache.layer_bytes for i in range(5))
    assert torch.equal(split.logits(TOKENS[:150]), alone.logits(TOKENS[:150]))


def test_a_split_model_with_an_adapter_and_room_for_it() -> None:
    alone, split = (Model(ModelConfig.from_directory(BASE)) for _ in range(2))
    alone.load(devices="cpu")
    slots = {name: 10_000 for name in alone.linears}
    split.load(devices=["cpu=9MiB", "cpu=9MiB", "cpu=9MiB"], slots=slots)
    got, expected = (each.logits(TOKENS, [Lora.from_directory(each, ADAPTERS / "json")]) for each in (split, alone))
    assert torch.equal(got, expected)
    with pytest.raises(ModelError, match="model, cache and slots need"):
        split.load(devices=["cpu=9MiB", "cpu=9MiB"], slots=slots | {"lm_head": 9 * MIB})
    assert split.layer_devices == ()


def test_the_plan_counts_what_a_loaded_model_holds(tmp_path: Path) -> None:
    config = ModelConfig.from_directory(BASE)
    model, budgets = Model(config), find_budgets("cpu")
    cache = Cache(model, 1000, "q6")
    model.load(cache, "cpu")
    made = needs(config, checkpoint(config), budgets, {"lm_head": 7}).plan(Wish(1000, "q6", 3), budgets).on(0)
    held = sum(linear.weight.nbytes for linear in model.linears.values()) + model.embedding.nbytes
    norms = sum(norm.nbytes for layer in model.layers for norm in layer.norms.values())
    assert made == Part("cpu", held + norms, 5 * cache.layer_bytes, 21)
    packed = needs(config, checkpoint(config), [Budget(A, None)], {})
    assert set(packed.formats) == {"gptq", "float"} and sum(packed.formats.values()) == sum(packed.weights)
    assert abs(sum(packed.weights) / (BASE / "model.safetensors").stat().st_size - 1) < 0.01


def test_advice_is_the_most_that_fits() -> None:
    """A model of 10 layers of 100 kB each; a page of fp16 K and V of one head of 64 takes 64 KiB a layer."""
    made = Needs((0, *[100_000] * 10, 0), {}, (0, *[10_000] * 10, 0), 1, 64, 0)
    wish, budgets = Wish(16 * 256, "fp16", 8), [Budget(A, 8_000_000)]
    assert not made.plan(wish, budgets).fits
    said = advice(made, wish, budgets)
    assert said[:2] == ["--cache-tokens 2304", "--cache-dtype q8"] and said[-1].startswith("1 more device with as much")
    assert made.plan(Wish(2304, "fp16", 8), budgets).fits and not made.plan(Wish(2560, "fp16", 8), budgets).fits
    assert made.plan(Wish(16 * 256, "q8", 8), budgets).fits
    narrow = [Budget(A, 1_500_000)]
    assert advice(made, wish, narrow)[0] == "--cache-dtype q4 --slots 1 --cache-tokens 512"
    assert made.plan(Wish(512, "q4", 1), narrow).fits and not made.plan(Wish(768, "q4", 1), narrow).fits
    assert advice(made, wish, [Budget(A, 1000)]) == ["larger devices, or a model that is quantised to fewer bits"]


def test_slots_are_named_when_they_are_too_many() -> None:
    made = Needs((0, 1000, 0), {}, (0, 1000, 0), 1, 64, 0)
    assert "--slots 9" in advice(made, Wish(0, "fp16", 32), [Budget(A, 10_500)])


def test_a_failed_plan_is_an_error_of_one_sentence() -> None:
    with pytest.raises(LorayardError, match=r"lorayard info MODEL"):
        Model(ModelConfig.from_directory(BASE)).load(devices={"cpu": "1MiB"})
