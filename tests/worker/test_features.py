"""Every feature of PEFT's LoRA against peft, alone and mixed in one batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lorayard.shared.errors import Refused
from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.lora.bank import LoraBank
from lorayard.worker.lora.parity import measure

from ..features import ALONE, FEATURES, write_feature
from ..packers import pack_model
from ..stepper import Sequence, Stepper
from ..tiny import reference, reference_logits, relative, write_model

PROMPT = torch.randint(3, 160, (40,), generator=torch.Generator().manual_seed(3)).tolist()
BASES = {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
}
Loaded = tuple[Model, dict[str, Path]]


@pytest.fixture(scope="module", params=BASES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A base and an adapter of every feature."""
    root = tmp_path_factory.mktemp(request.param)
    base = write_model(root / "base", **BASES[request.param])
    model = Model(ModelConfig.from_directory(base))
    model.load(devices="cpu")
    paths = {name: write_feature(root / f"a{index}", base, name, seed=index) for index, name in enumerate(FEATURES)}
    return model, paths


@pytest.mark.parametrize("name", FEATURES)
def test_logits_equal_peft(name: str, loaded: Loaded) -> None:
    model, paths = loaded
    lora = Lora.from_directory(model, paths[name])
    logits = model.logits(PROMPT, [lora])
    assert relative(logits, reference_logits(reference(model.config.path, [(paths[name], 1.0)]), PROMPT)) < 1e-3
    assert relative(logits, model.logits(PROMPT)) > 1e-2
    if lora.changes:
        without = dataclasses.replace(lora, changes={}, alone="")
        assert relative(logits, model.logits(PROMPT, [without])) > 1e-2


@pytest.mark.parametrize("name", ["dora", "dora everywhere", "much", "own head, LoRA embedding", "lora_bias"])
def test_a_packed_base_is_dequantised(name: str, tmp_path: Path) -> None:
    """DoRA's gain is of the weights that the packed ones mean; a base weight beside LoRA is compared with them."""
    packed, exact = tmp_path / "packed", tmp_path / "exact"
    pack_model(write_model(tmp_path / "source", attention_bias=True), packed, exact, ["gptq-4bit", "awq", "exl2-4bit"])
    adapter = write_feature(tmp_path / "adapter", exact, name)
    model = Model(ModelConfig.from_directory(packed))
    model.load(devices="cpu")
    lora = Lora.from_directory(model, adapter)
    owned = [module for module, change in lora.changes.items() if change.weight is not None]
    assert owned == (["lm_head"] if "modules_to_save" in FEATURES[name] else [])
    expected = reference_logits(reference(exact, [(adapter, 1.0)]), PROMPT)
    assert relative(model.logits(PROMPT, [lora]), expected) < 1e-3
    assert measure(packed, adapter) < 1e-4


def test_a_mixed_batch_gives_each_row_the_bits_it_gets_alone(loaded: Loaded) -> None:
    """Chunks of prefill and single tokens of every feature at once, in slots side by side."""
    model, paths = loaded
    loras = [Lora.from_directory(model, path) for path in paths.values()]
    sums = [lora for lora in loras if not lora.alone]
    sets = [[], *([(lora, 1.0)] for lora in loras), [(sums[0], 0.7), (sums[-1], -0.4)], [(sums[1], 0.5)]]
    texts = [PROMPT[i % 7 : i % 7 + 3 + i] for i in range(len(sets))]
    alone = []
    for pairs, text in zip(sets, texts, strict=True):
        stepper, sequence = Stepper(model, 256), Sequence(pairs)
        alone.append([stepper.step([(sequence, part)])[0] for part in (text, PROMPT[:1], PROMPT[5:8])])
    stepper, sequences = Stepper(model, 256 * len(sets), slots=len(sets)), [Sequence(pairs) for pairs in sets]
    together = [stepper.step(list(zip(sequences, texts, strict=True)))]
    together += [stepper.step([(each, part) for each in sequences]) for part in (PROMPT[:1], PROMPT[5:8])]
    for index, expected in enumerate(alone):
        assert all(torch.equal(step[index], rows) for step, rows in zip(together, expected, strict=True)), sets[index]


def test_what_is_no_sum_runs_alone_and_at_scale_one(loaded: Loaded) -> None:
    model, paths = loaded
    loras = {name: Lora.from_directory(model, path) for name, path in paths.items()}
    has_bias = model.linears["model.layers.0.self_attn.q_proj"].bias is not None
    needs_bias = {"bias all", "bias lora_only", "lora_bias, bias"}
    assert {name for name, lora in loras.items() if lora.alone} == (ALONE if has_bias else ALONE - needs_bias)
    for name, lora in loras.items():
        other = loras["list" if name == "linears" else "linears"]
        for pairs in ([(lora, 0.5)], [(lora, 1.0), (other, 1.0)]):
            if lora.alone:
                with pytest.raises(Refused, match=f"uses {lora.alone}: it runs alone and at scale 1") as raised:
                    model.logits(PROMPT, pairs)
                assert raised.value.code == "bad_adapter"
            else:
                assert model.logits(PROMPT, pairs).isfinite().all()
        if lora.alone:
            with pytest.raises(Refused, match="runs alone"):
                LoraBank(model).place((lora, other))


def test_lora_scaling_is_peft_s_set_scale(loaded: Loaded) -> None:
    """Of DoRA and of a lora_bias, too; what modules_to_save and biases replace has no scale."""
    model, paths = loaded
    for name in ("linears", "lora_bias", "dora everywhere", "much"):
        expected = reference(model.config.path, [(paths[name], 0.5)])
        logits = model.logits(PROMPT, [Lora.from_directory(model, paths[name], lora_scaling=0.5)])
        assert relative(logits, reference_logits(expected, PROMPT)) < 1e-3


SUMS = [
    [("lora_bias", 0.5)],
    [("lora_bias", 0.7), ("embedding and head", -0.4)],
    [("patterns", 1.5), ("embedding", 0.3)],
]


@pytest.mark.parametrize("pairs", SUMS)
def test_sums_with_scales_equal_peft(pairs: list[tuple[str, float]], loaded: Loaded) -> None:
    model, paths = loaded
    expected = reference(model.config.path, [(paths[name], scale) for name, scale in pairs])
    loras = [(Lora.from_directory(model, paths[name]), scale) for name, scale in pairs]
    assert relative(model.logits(PROMPT, loras), reference_logits(expected, PROMPT)) < 1e-3
