"""`lorayard bench` on the CPU: what it runs, what it says, how it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from lorayard.shared.cli import run
from lorayard.worker import Cache, Model, ModelConfig, Tokenizer
from lorayard.worker.bench.measure import Engine, wall
from lorayard.worker.bench.shapes import SHAPES, made
from lorayard.worker.bench.workloads import OTHERS, ROWS, Row, others
from lorayard.worker.cache.storage import PAGE
from lorayard.worker.models.memory import CHUNK, SEATS, workspace
from lorayard.worker.models.model import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def bench(folder: Path, *words: str) -> int:
    return run(["bench", "--shape", "tiny", "--devices", "cpu", "--folder", str(folder), "--repeats", "1", *words])


def test_figures_of_every_row_but_the_start(folder, capsys):
    assert bench(folder, "--json", "W1", "W2", "W4", "W5") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in ROWS if row.workload in ("W1", "W2", "W4", "W5")]
    assert [(each["workload"], each["row"]) for each in found] == [(row.workload, row.label) for row in rows]
    for each in found:
        assert each["out"] > 0 and each["prefill"] > 0 and each["device"].startswith("CPU") and each["torch"]
        assert each["out"] == pytest.approx(each["sequences"] * each["new"] / each["wall_s"])
    assert [each["sequences"] for each in found] == [1, 1, 4, 4, 4, 64, 64, 2, 2]
    assert [each["slots"] for each in found] == [1, 1, 1, 1, 4, 2, 2, 1, 2]


def test_start_load_and_swap_as_a_table(folder, capsys):
    assert bench(folder, "W6") == 0
    said = capsys.readouterr().out
    for words in ("W6 start to ready", "import ", "warmup ", "W6 adapter cold load", "W6 adapter swap", "torch 2."):
        assert words in said


def test_a_given_model_runs_whole_workloads_and_the_slots_asked_for(folder, capsys):
    words = ["--model", str(made(folder, "tiny", "gptq4")), "--devices", "cpu", "--repeats", "1", "--slots", "3"]
    assert run(["bench", *words, "--loras", "0", "--json", "W1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["new"], found["slots"], found["model"]) == (512, 256, 3, "tiny-gptq4")
    assert found["decode"] > 0


@pytest.mark.parametrize("kind", ["gptq4", "bf16", "fp16"])
def test_a_made_model_is_whole_and_made_once(kind, folder):
    path = made(folder, "tiny", kind)
    assert checkpoint(ModelConfig.from_directory(path)).entries
    assert made(folder, "tiny", kind) == path and not list(folder.glob(f"tiny-{kind}-*"))


def test_the_command_of_the_docs(folder, monkeypatch, capsys):
    """The block of docs/performance.md, as it stands."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    (block,) = re.findall(
        r"```sh\n(.*?)```", (Path(__file__).parents[2] / "docs/performance.md").read_text(), re.DOTALL
    )
    for command in block.strip().splitlines():
        _, *words = command.split()
        assert run(words) == 0
        assert "decode tok/s" in capsys.readouterr().out
    assert (folder / "lorayard" / "bench" / "tiny-gptq4").is_dir()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_step_takes_no_more_than_the_workspace(folder):
    """A step of CHUNK tokens of prompts and SEATS of answers, at the sizes of a model that is used."""
    path, row = made(folder, "llama-1b", "gptq4"), Row("W2", "", "decode", SEATS, 64, 4)
    model = Model(ModelConfig.from_directory(path))
    model.load(devices="cuda")
    engine = Engine(model, Cache(model, SEATS * PAGE), Tokenizer.from_directory(path), SEATS, CHUNK)
    generator = engine.generator(row)
    wall(engine, generator, row, 4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    wall(engine, generator, row, 4)
    taken, reckoned = torch.cuda.max_memory_allocated() - before, workspace(model.config, 2)
    assert reckoned / 8 < taken < reckoned, (taken, reckoned)


def test_refusals(folder, capsys):
    for words, said in {
        ("W1", "--profile"): "--profile needs a GPU",
        ("W7",): "'W7' is not one of",
        ("W1", "--loras", "7"): "no row of W1 has 7 LoRAs",
        ("W1", "--model", str(folder)): "--model brings its own shape",
        ("W1", "--cache-dtype", "q5"): "a cache's dtype is one of",
    }.items():
        assert bench(folder, *words) != 0
        out, err = capsys.readouterr()
        assert said in err and err.count("\n") <= 4 and not out


def test_what_others_reach_is_told_for_every_row():
    assert all(len(known) == len(ROWS) for known in OTHERS.values())
    known = {(row.workload, row.label): others(row, "llama-8b", "gptq4") for row in ROWS}
    assert known["W2", "64 LoRAs"].vllm == 1893 and known["W5", "no LoRA"].goal == 49000
    assert others(ROWS[0], "tiny", "gptq4") is None


def test_a_small_shape_runs_a_part():
    assert Row("W4", "", "out", 1024, 256, 128, 32, 128, 4).smaller(SHAPES["tiny"].share) == Row(
        "W4", "", "out", 64, 16, 8, 2, 8, 2
    )
