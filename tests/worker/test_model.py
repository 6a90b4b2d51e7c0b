"""Checkpoints in the ways they come, and their caches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorayard.demo import BASE
from lorayard.kernels.linear_gptq import dequantise, linear_gptq
from lorayard.kernels.pool import FloatPool
from lorayard.worker import Cache, Model, ModelConfig

from ..tiny import relative, write_model

TOKENS = list(range(3, 40))


def logits(path: Path) -> torch.Tensor:
    model = Model(ModelConfig.from_directory(path))
    model.load(devices="cpu")
    return model.logits(TOKENS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "base")


def test_shards_old_names_zero_biases_and_a_stale_index(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.mlp.up_proj.bias": torch.zeros(96),
        "layers.0.attention.wq.weight": torch.ones(1),
    }
    save_file({name: tensors[name] for name in names[1::2]} | extra, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    shutil.copy(base / "config.json", tmp_path)
    assert torch.equal(logits(tmp_path), logits(base))


def test_gptq_v2_and_a_missing_or_empty_g_idx_are_the_same_model(tmp_path: Path) -> None:
    expected = logits(BASE)
    config = json.loads((BASE / "config.json").read_text())
    for version, empty in (("gptq_v2", False), ("gptq", True)):
        tensors = load_file(BASE / "model.safetensors")
        for name in list(tensors):
            if name.endswith(".qzeros") and version == "gptq_v2":
                tensors[name] = tensors[name] + 0x11111111
            if name.endswith(".g_idx"):
                tensors.update({name: torch.zeros_like(tensors[name])} if empty else {})
                tensors = tensors if empty else {n: t for n, t in tensors.items() if n != name}
        path = tmp_path / version
        path.mkdir()
        config["quantization_config"]["checkpoint_format"] = version
        (path / "config.json").write_text(json.dumps(config))
        save_file(tensors, path / "model.safetensors")
        assert torch.equal(logits(path), expected)


def test_dequantising_and_multiplying_by_hand() -> None:
    """Zero points of 0 and 16 and groups out of order among them."""
    draw = torch.Generator().manual_seed(7)
    levels = torch.randint(0, 16, (16, 8), generator=draw)
    zeros = torch.randint(0, 17, (3, 8), generator=draw)
    scales = torch.rand(3, 8, generator=draw).half()
    group = torch.randint(0, 3, (16,), generator=draw)
    words = (levels.view(2, 8, 8) << torch.arange(0, 32, 4)[:, None]).sum(1).to(torch.int32)
    weight = dequantise(words, zeros.to(torch.int8), scales, group)
    for k in range(16):
        for n in range(8):
            exact = int(levels[k, n] - zeros[group[k], n]) * float(scales[group[k], n])
            assert weight[k, n] == torch.tensor(exact).half()
    x, bias = torch.randn(5, 16, generator=draw).half(), torch.rand(8, generator=draw).half()
    got = linear_gptq(x, words, zeros.to(torch.int8), scales, group, bias)
    assert relative(got, x.float() @ weight.float() + bias.float()) < 1e-3


def test_a_cache_is_allocated_as_layers_land_or_after(base: Path) -> None:
    model = Model(ModelConfig.from_directory(base))
    cache = Cache(model, 257, "bf16")
    assert (cache.pages, cache.max_tokens, cache.layers) == (2, 512, [None, None])
    done: list[tuple[int, int]] = []
    model.load(cache, devices=["cpu"], progress=lambda i, n: done.append((i, n)))
    steps, total = [i for i, _ in done], sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert len(done) == 4 and steps == sorted(set(steps)) and {n for _, n in done} == {steps[-1]}
    assert total - 10_000 < steps[-1] < total and steps[0] == 160 * 64 * 4
    pools = [pool for i in (0, 1) for pool in cache[i]]
    assert all(isinstance(pool, FloatPool) and pool.values.dtype == torch.bfloat16 for pool in pools)
    assert {pool.shape for pool in pools} == {(2, 2, 256, 16)}
    assert sum(pool.nbytes for pool in cache[0]) == cache.layer_bytes
    assert Cache(model, 1)[1][0].shape == (1, 2, 256, 16)
    model.unload()
    assert model.layer_devices == () and not model.linears
