"""`lorayard info MODEL`: sizes that add up, proposals that fit, and nothing but headers read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorayard.demo import ADAPTERS, BASE
from lorayard.shared.cli import run
from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.lora.bank import LoraBank
from lorayard.worker.lora.space import slot_space

Screen = pytest.CaptureFixture[str]
INFO = ["info", str(BASE), "--adapters", str(ADAPTERS)]


def asked(capsys: Screen, *options: str, status: int = 0) -> dict[str, Any]:
    assert run([*INFO, *options, "--json"]) == status
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_sizes_add_up(capsys: Screen) -> None:
    said = asked(capsys, "--devices", "cuda:0=1GiB,cuda:1=1GiB", "--cache-tokens", "1000", "--slots", "3")
    one, two = said["devices"]
    assert said["fits"] and (one["layers"], two["layers"]) == (5, 0) and said["unplaced"] == []
    assert one["weights"] == sum(said["weights"].values()) and set(said["weights"]) == {"gptq", "float"}
    assert one["cache"] == said["cache"]["bytes"] == 5 * 4 * 256 * 2 * 2 * 64 * 2
    assert one["slots"] == said["slots"]["bytes"] == 3 * said["slots"]["bytes_each"] > 0
    assert one["sum"] == sum(one[name] for name in ("weights", "cache", "slots")) and one["room"] == 1 << 30
    assert said["adapters"] == {"count": 3, "problems": []} and said["host"]["pinned"] == 0


def test_a_slot_holds_what_was_planned_for_it() -> None:
    config = ModelConfig.from_directory(BASE)
    model, space = Model(config), slot_space(config, [ADAPTERS], 4)
    model.load(devices="cpu")
    largest = 0
    for path in ADAPTERS.iterdir():
        bank = LoraBank(model, slots=1)
        bank.place((Lora.from_directory(model, path),))
        held = sum(half.nbytes for module, packed in bank._slots[0].stacked.items() for half in packed[module])
        largest = max(largest, held)
    assert sum(space.modules.values()) == largest


def test_each_change_that_is_proposed_makes_it_fit(capsys: Screen) -> None:
    wish = ["--cache-tokens", "4096"]
    changes = asked(capsys, "--devices", "cuda:0=6MiB", *wish, status=1)["change"]
    more = re.fullmatch("([0-9]) more devices with as much room as cuda:0", changes[-1])
    options = [change.split() for change in changes[:-1]]
    assert more and options and all(option[0].startswith("--") for option in options)
    for option in options:
        assert asked(capsys, "--devices", "cuda:0=6MiB", *wish, *option)["fits"]
    for count, status in ((int(more[1]), 1), (int(more[1]) + 1, 0)):
        devices = ",".join(f"cuda:{i}=6MiB" for i in range(count))
        assert asked(capsys, "--devices", devices, *wish, status=status)["fits"] == (status == 0)


def test_words_for_a_pipe(capsys: Screen) -> None:
    assert run([*INFO, "--devices", "cpu", "--cache-dtype", "q4", "--cache-tokens", "512"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model base: float ") and lines[-1] == "it fits"
    assert lines[1] == "cache: 512 tokens of q4 in 2 pages, 0.4 MiB"
    assert lines[-2].startswith("device cpu layers 5 weights ") and lines[-2].endswith("room - workspace 0.0 MiB")
    assert run([*INFO, "--gpu-split", "0.001"]) == 1
    assert "it does not fit: no room for " in capsys.readouterr().out


def test_adapters_that_are_broken_are_passed_over(capsys: Screen, tmp_path: Path) -> None:
    shutil.copytree(ADAPTERS / "json", tmp_path / "good")
    shutil.copytree(ADAPTERS / "json", tmp_path / "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    assert run(["info", str(BASE), "--devices", "cpu", "--adapters", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["adapters"]
    assert said["count"] == 1 and len(said["problems"]) == 1 and "adapter_config.json" in said["problems"][0]


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["info", "/no/such"], 4, "/no/such is not a folder"),
        (["info", str(BASE), "--devices", "tpu"], 2, "device 'tpu'"),
        (["info", str(BASE), "--devices", "cpu", "--cache-dtype", "q5"], 2, "not 'q5'"),
        (["info", str(BASE), "--gpu-split", "20,x"], 2, "--gpu-split must be GiB"),
        (["info", "--slots", "3"], 2, "--slots is for a model: lorayard info MODEL"),
        (["info", "--json"], 2, "--json is for a model"),
    ],
)
def test_a_mistake_is_one_sentence(capsys: Screen, arguments: list[str], status: int, sentence: str) -> None:
    assert run(arguments) == status
    out, err = capsys.readouterr()
    assert sentence in err and not out and "Traceback" not in err
