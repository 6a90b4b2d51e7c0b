"""`lorayard generate`: what it writes and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorayard.shared.cli import run

DEMO = ["generate", "--demo", "--chat", "--temperature", "0", "--devices", "cpu"]


def test_answers_come_in_the_order_of_the_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*DEMO, "--adapter", "shout", "What does len do?", "What is KeyError?"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [lines[0], lines[2]] == ["> What does len do?", "> What is KeyError?"]
    assert len(lines) == 4 and lines[1].isupper() and lines[3].isupper() and not err


def test_a_weighted_sum_and_a_stop_string(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*DEMO, "--adapter", "json*1.0+shout*0.0", "--stop", ', "topic"', "What does len do?"]) == 0
    text = capsys.readouterr().out
    assert text.startswith('{"answer"') and "topic" not in text
    assert isinstance(json.loads(text + "}")["answer"], str)


def test_a_split_model_with_a_quantised_cache(capsys: pytest.CaptureFixture[str]) -> None:
    devices = ["--devices", "cpu=10MiB,cpu=10MiB", "--cache-dtype", "q8", "--cache-tokens", "512"]
    assert run([*DEMO[:-2], *devices, "--adapter", "shout", "What does len do?"]) == 0
    split = capsys.readouterr().out
    assert run([*DEMO, *devices[2:], "--adapter", "shout", "What does len do?"]) == 0
    assert split == capsys.readouterr().out and split.isupper()


def test_the_same_seed_gives_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert run([*DEMO[:3], "--temperature", "20", "--max-tokens", "9", "--seed", seed, "What is len?"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_what_changes_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for words in ([], ["--rope-scale", "4"], ["--rope-alpha", "1000"]):
        assert run([*DEMO, "--max-tokens", "20", *words, "What does len do?"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 3
    assert run([*DEMO, "--max-seq-len", "8", "--max-tokens", "20", "What does len do?"]) == 1
    assert "together they may be at most 8" in capsys.readouterr().err


def test_samples_settings_and_banned_text(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-tokens", "9", "--seed", "3", "--samples", "2", "--set", "xtc_probability=0.5", "--ban", "e"]
    assert run([*DEMO[:3], "--preset", "exllamav2", "--temperature", "20", "--heal", *options, "What", "Why"]) == 0
    prompts, answers = [], []
    for line in capsys.readouterr().out.split("> ")[1:]:
        prompt, _, answer = line.partition("\n")
        prompts.append(prompt)
        answers.append(answer)
    assert prompts == ["What", "What", "Why", "Why"] and len(set(answers)) == 4
    assert not any("e" in answer.lower() for answer in answers)
    bias = ["--set", 'logit_bias={"300": 1000}', "--set", "banned_tokens=[5]", "--max-tokens", "3"]
    assert run([*DEMO, *bias, "x"]) == 0
    text = capsys.readouterr().out.strip()
    assert text and text == text[: len(text) // 3] * 3


@pytest.mark.parametrize(
    "arguments, status, sentence",
    [
        ([*DEMO, "--set", "colour=1", "x"], 2, "there is no setting 'colour'; there are: temperature, top_k"),
        ([*DEMO, "--set", "top_a=much", "x"], 2, "top_a: 'much' is not JSON"),
        ([*DEMO, "--set", 'logit_bias={"x": 1}', "x"], 1, "logit_bias must name tokens by their ids"),
        ([*DEMO, "--samples", "65", "x"], 1, "n must be between 1 and 64"),
        (["generate", "--demo"], 2, "a prompt is missing"),
        (["generate", "model"], 2, "a prompt is missing"),
        (["generate", "/no/such/model", "x"], 4, "/no/such/model"),
        ([*DEMO, "--adapter", "nobody", "x"], 2, "there is no adapter nobody; there are: bullets, json, shout"),
        ([*DEMO, "--adapter", "../x", "x"], 1, "adapter id '../x' must match"),
        ([*DEMO, "--temperature", "-1", "x"], 1, "temperature must be between 0 and 100"),
        ([*DEMO, "--max-tokens", "5000", "x"], 1, "together they may be at most 2048"),
        ([*DEMO, "--cache-dtype", "q5", "x"], 2, "one of fp16, bf16, fp32, q8, q6, q4, not 'q5'"),
        ([*DEMO, "--gpu-split", "20,20", "x"], 2, "--gpu-split has 2 sizes for 1 devices: cpu"),
        ([*DEMO, "--max-tokens", "0", "x"], 2, "--max-tokens"),
        ([*DEMO[:-1], "tpu", "x"], 2, "device 'tpu'"),
    ],
)
def test_a_mistake_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, sentence: str
) -> None:
    assert run(arguments) == status
    out, err = capsys.readouterr()
    assert sentence in err and not out and "Traceback" not in err


def test_a_broken_adapter_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    (tmp_path / "broken" / "adapter_model.safetensors").touch()
    assert run([*DEMO, "--adapters", str(tmp_path), "--adapter", "broken", "x"]) == 2
    assert "adapter_config.json is not JSON" in capsys.readouterr().err
