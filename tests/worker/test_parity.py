"""The engine against transformers and peft on random tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorayard.worker import Lora, Model, ModelConfig

from ..stepper import Sequence, Stepper
from ..tiny import WITH_SCALING, reference, reference_logits, relative, write_adapter, write_model

PROMPT = torch.randint(3, 160, (70,), generator=torch.Generator().manual_seed(3)).tolist()
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_parameters": WITH_SCALING},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
}
SETS: dict[str, list[tuple[str, float]]] = {
    "base": [],
    "one": [("one", 1.0)],
    "rslora": [("rslora", 1.0)],
    "patterns": [("patterns", 1.0)],
    "weighted sum": [("one", 0.7), ("rslora", -0.4)],
}


def load(path: Path) -> Model:
    """The model on the CPU."""
    model = Model(ModelConfig.from_directory(path))
    model.load(devices="cpu")
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("parity") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    root = base.parent
    return {
        "one": write_adapter(root / "one", base, seed=1, r=4, alpha=8),
        "rslora": write_adapter(root / "rslora", base, seed=2, r=9, alpha=6, use_rslora=True,
                                target_modules=["q_proj", "down_proj"]),
        "patterns": write_adapter(root / "patterns", base, seed=3, r=4, alpha=8,
                                  rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6},
                                  alpha_pattern={"k_proj": 20, "model.layers.0.mlp.up_proj": 1}),
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(base: Path) -> Model:
    return load(base)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_kind_of_model(name: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, seed=5, **MODELS[name])
    expected = reference_logits(reference(path, []), PROMPT)
    assert relative(load(path).logits(PROMPT), expected) < 1e-3
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", SETS)
def test_logits_and_greedy_tokens_of_every_kind_of_set(
    name: str, base: Path, adapters: dict[str, Path], model: Model
) -> None:
    expected = reference(base, [(adapters[n], scale) for n, scale in SETS[name]])
    pairs = [(Lora.from_directory(model, adapters[n]), scale) for n, scale in SETS[name]]
    logits = model.logits(PROMPT, pairs)
    assert relative(logits, reference_logits(expected, PROMPT)) < 1e-3
    if pairs:
        assert relative(logits, model.logits(PROMPT)) > 1e-2
    tokens = greedy(model, pairs, PROMPT, 64)
    assert tokens == reference_logits(expected, PROMPT + tokens)[len(PROMPT) - 1 : -1].argmax(-1).tolist()


def greedy(model: Model, pairs: list[tuple[Lora, float]], prompt: list[int], new: int) -> list[int]:
    stepper, sequence, tokens = Stepper(model), Sequence(pairs), prompt
    out: list[int] = []
    while len(out) < new:
        out.append(int(stepper.step([(sequence, tokens)])[0][-1].argmax()))
        tokens = out[-1:]
    return out


def test_lora_scaling_is_a_factor_and_changes_the_digest(adapters: dict[str, Path], model: Model) -> None:
    plain, half = (Lora.from_directory(model, adapters["one"], scaling) for scaling in (1.0, 0.5))
    assert relative(model.logits(PROMPT, [half]), model.logits(PROMPT, [(plain, 0.5)])) < 1e-5
    assert plain.digest != half.digest


def test_rope_alpha_stretches_the_base(base: Path) -> None:
    config = ModelConfig.from_directory(base, rope_alpha=2, max_seq_len=100)
    model = Model(config)
    model.load(devices="cpu")
    stretched = reference(base, [])
    theta = 10000.0 * 2 ** (16 / 14)
    frequencies = theta ** -(torch.arange(0, 16, 2) / 16)
    stretched.model.rotary_emb.inv_freq.copy_(frequencies)
    assert relative(model.logits(PROMPT), reference_logits(stretched, PROMPT)) < 1e-3
    assert relative(load(base).logits(PROMPT), reference_logits(stretched, PROMPT)) > 1e-2
