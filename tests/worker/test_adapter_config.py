"""Every key of PEFT's LoRA config, the patterns in it, and the modules that it targets."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorayard.shared.errors import NotSupported
from lorayard.worker.lora.config import HARMLESS, READ, AdapterConfig
from lorayard.worker.lora.targets import short, targeted
from lorayard.worker.pattern import Pattern

from ..features import FEATURES

BASIS: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
REFUSED: dict[str, Any] = {
    "megatron_config": {"a": 1}, "velora_config": {"scale": 1.0}, "alora_invocation_tokens": [1], "use_qalora": True,
    "monteclora_config": {"num_samples": 8}, "layer_replication": [[0, 2]], "target_parameters": ["experts.up"],
    "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 3}, "kasa_config": {"a": 1},
}  # fmt: skip
"""Keys that change the mathematics, each with a value that does."""
WHY_HARMLESS = {
    "task_type": "what was trained; the tensors tell whether there is a head of another kind",
    "auto_mapping": "which Python class to make",
    "peft_version": "who wrote it",
    "base_model_name_or_path": "where the base was; shapes tell whether ours is it",
    "revision": "where the base was",
    "inference_mode": "whether to train",
    "lora_dropout": "only in training",
    "fan_in_fan_out": "only for Conv1D; PEFT sets it to false for linears",
    "megatron_core": "a module's name, used with megatron_config only",
    "loftq_config": "used with init_lora_weights loftq only",
    "eva_config": "how A was begun",
    "corda_config": "used with init_lora_weights corda only",
    "lora_ga_config": "used with init_lora_weights lora_ga only",
    "qalora_group_size": "used with use_qalora only",
    "runtime_config": "where to compute; PEFT does not save it",
}
MODULES = [
    *(f"model.layers.{i}.{module}" for i in range(12) for module in
      ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
       "mlp.down_proj")),
    "model.embed_tokens", "lm_head",
]  # fmt: skip


def read(path: Path, **keys: Any) -> AdapterConfig:
    (path / "adapter_config.json").write_text(json.dumps(BASIS | keys))
    return AdapterConfig.from_directory(path)


def test_every_key_is_read_or_harmless_for_a_reason_or_refused() -> None:
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert known == READ | HARMLESS | REFUSED.keys()
    assert WHY_HARMLESS.keys() == HARMLESS
    assert len(READ) + len(HARMLESS) + len(REFUSED) == len(known)


@pytest.mark.parametrize("key", REFUSED)
def test_what_changes_the_mathematics_is_refused_by_name(key: str, tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match=f"{key} is set"):
        read(tmp_path, **{key: REFUSED[key]})
    read(tmp_path, **{key: None})


@pytest.mark.parametrize("name", FEATURES)
def test_targets_are_peft_s(name: str, tmp_path: Path) -> None:
    keys = {"target_modules": ["q_proj", "down_proj"]} | FEATURES[name]
    keys.pop("trainable_token_indices", None)
    keys.pop("layers_pattern", None)
    theirs = LoraConfig(**keys)
    if theirs.target_modules == "all-linear":
        theirs.target_modules = set(MODULES[:-2])
    assert targeted(read(tmp_path, **keys), MODULES, tied=False) == {
        module for module in MODULES if check_target_module_exists(theirs, module)
    }


LAYERS = [
    {"layers_to_transform": [1, 11], "target_modules": ["proj", "q_proj", "model.layers.3.mlp.up_proj"]},
    {"layers_to_transform": 10, "layers_pattern": ["h", "layers"]},
    {"layers_to_transform": [1], "layers_pattern": "model.layers"},
    {"layers_to_transform": [], "exclude_modules": "model.*[02468]\\.mlp.*", "target_modules": ["up_proj", "q_proj"]},
    {"exclude_modules": ["5.self_attn.q_proj", "mlp", "model.layers.7.self_attn.q_proj"]},
    {"modules_to_save": ["lm_head"], "target_modules": ".*(q_proj|lm_head)"},
]


@pytest.mark.parametrize("keys", LAYERS)
def test_targets_in_some_layers_are_peft_s(keys: dict[str, Any], tmp_path: Path) -> None:
    theirs = LoraConfig(**({"target_modules": ["q_proj"]} | keys))
    expected = {module for module in MODULES if check_target_module_exists(theirs, module) is True or (
        isinstance(theirs.target_modules, str) and re.fullmatch(theirs.target_modules, module) and module != "lm_head"
    )}  # fmt: skip
    assert targeted(read(tmp_path, **keys), MODULES, tied=False) == expected != set()


PATTERNS = [
    {"q_proj": 1, "layers.1.self_attn.v_proj": 2, "v_proj": 3},
    {"^model.layers.0.mlp.up_proj": 1, "up_proj$": 2, "proj": 3, ".*": 4},
    {"layers.1": 1, r"1\.mlp\..*": 2, "mlp.(up|gate)_proj": 3, "up_proj|o_proj": 4, "[qk]_proj": 5, "embed_tokens": 6},
    {"lm.head": 1, "layers.1.mlp.up.proj": 2, r"(?:model\.)?layers\.[0-3]\..+": 3, "": 4},
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_the_pattern_that_counts_is_peft_s(patterns: dict[str, int], tmp_path: Path) -> None:
    ranks = read(tmp_path, rank_pattern=patterns).ranks(MODULES)
    assert ranks == {module: patterns.get(get_pattern_key(patterns, module), 8) for module in MODULES}


def random_pattern(draw: random.Random, depth: int) -> str:
    kind = draw.random() if depth else 0.0
    if kind < 0.3:
        return draw.choice(["a", "b", "\\.", ".", "[ab]", "[^a]", "\\d", "\\w", "\\S", "[a-c.\\d]", "1"])
    if kind < 0.5:
        return random_pattern(draw, depth - 1) + random_pattern(draw, depth - 1)
    if kind < 0.65:
        return f"({random_pattern(draw, depth - 1)}|{random_pattern(draw, depth - 1)})"
    if kind < 0.95:
        return f"(?:{random_pattern(draw, depth - 1)}){draw.choice(['*', '+', '?', '{2}', '{1,2}', '{0,}', '*?', ''])}"
    return draw.choice("^$") + random_pattern(draw, depth - 1)


def test_random_patterns_match_what_python_s_own_do() -> None:
    draw, hits = random.Random(5), 0
    for _ in range(1000):
        text = random_pattern(draw, 4)
        expected, pattern = re.compile(text), Pattern(text, "here")
        for _ in range(4):
            name = "".join(draw.choices("ab.1c", k=draw.randint(0, 7)))
            assert pattern.fullmatch(name) == bool(expected.fullmatch(name)), (text, name)
            assert pattern.fullmatch_end(name) == bool(re.match(rf"(.*\.)?({text})$", name)), (text, name)
            hits += pattern.fullmatch(name)
    assert hits > 300


HOSTILE = ["(a+)+$", "(((((a*)*)*)*)*)*b", ".*" * 2000 + "x", "((a{1000}){1000}){1000}", "(a?){65000}", "(a|b|ab)*c"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_patterns_end_soon(text: str) -> None:
    start = time.process_time()
    pattern = Pattern(text, "here")
    try:
        for module in MODULES:
            assert not pattern.fullmatch(module) and not pattern.fullmatch("a" * 50 + "!")
    except NotSupported as reason:
        assert "takes too long to match" in str(reason)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "text", ["(?i)a", "(?i:a)", "(a)\\1", "(?=a)a", "(?<!a)b", "\\ba", "(?>a)", "a*+", "(", "a{9" + "9" * 99 + "}"]
)
def test_patterns_that_are_refused_by_name(text: str) -> None:
    with pytest.raises(NotSupported, match="^here: pattern"):
        Pattern(text, "here").fullmatch("aa")


def test_modules_in_few_words() -> None:
    assert short(MODULES[:2]) == "k_proj, q_proj x 1 layer"
    assert short([*MODULES[::7][:12], "lm_head"]) == "lm_head, q_proj x 12 layers"
    assert short([]) == ""
