"""GPTQ: round a model's linear layers to 4 bits, and read such a folder back as ordinary weights.

A weight is `(q - 8) * scale`, `q` in 0..15, one fp16 scale for each output and each GROUP inputs. The rounding error
of an input column is made good in the columns not yet rounded, weighted by how the inputs vary together (the Hessian).
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GROUP = 64
ZERO = 8
QUANTIZATION_CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}
NIBBLES = torch.arange(0, 32, 4)


def best_scale(weight: Tensor) -> Tensor:
    """The fp16 scale of each row of `weight` (N, GROUP) that loses least when it is rounded."""
    full = weight.abs().amax(1, keepdim=True).clamp(min=1e-5) / (ZERO - 0.5)
    candidates = (full * torch.linspace(0.6, 1.1, 51, device=weight.device)).half().float()
    levels = (weight[:, None] / candidates[..., None]).round().clamp(-ZERO, ZERO - 1)
    loss = (levels * candidates[..., None] - weight[:, None]).square().sum(-1)
    return candidates.gather(1, loss.argmin(1, keepdim=True))


def round_to_4_bits(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Levels q (K, N) and scales (K / GROUP, N) for a linear's weight (N, K), with error feedback."""
    weight = weight.float().clone()
    inputs = weight.shape[1]
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(inputs, device=hessian.device)
    feedback = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    levels, scales = [], []
    for k in range(inputs):
        if k % GROUP == 0:
            scales.append(best_scale(weight[:, k : k + GROUP]))
        column = weight[:, k : k + 1]
        level = (column / scales[-1]).round().clamp(-ZERO, ZERO - 1)
        error = (column - level * scales[-1]) / feedback[k, k]
        weight[:, k + 1 :] -= error * feedback[k, k + 1 :]
        levels.append(level + ZERO)
    return torch.cat(levels, 1).T.int(), torch.cat(scales, 1).T.half()


def pack(levels: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """The four tensors of one linear in the GPTQ v1 layout: eight levels down K in a word, the zero point less one."""
    inputs, outputs = levels.shape
    words = (levels.cpu().long().view(inputs // 8, 8, outputs) << NIBBLES[:, None]).sum(1)
    zeros = torch.full((len(scales), outputs // 8), (ZERO - 1) * 0x11111111, dtype=torch.int32)
    g_idx = torch.arange(inputs, dtype=torch.int32) // GROUP
    return {"qweight": words.int(), "qzeros": zeros, "scales": scales.cpu().contiguous(), "g_idx": g_idx}


def unpack(packed: dict[str, Tensor]) -> Tensor:
    """A linear's weight (N, K) from the four tensors of the layout."""
    levels = (packed["qweight"][:, None] >> NIBBLES[:, None] & 15).flatten(0, 1)
    zeros = (packed["qzeros"][..., None] >> NIBBLES & 15).flatten(1) + 1
    group = packed["g_idx"].long()
    return ((levels - zeros[group]).half() * packed["scales"][group]).T.float().contiguous()


def hessians(linears: dict[str, nn.Linear], run: Callable[[], None]) -> dict[str, Tensor]:
    """The sum of x xᵀ over the inputs x that each linear sees while `run` runs."""
    sums = {name: torch.zeros(module.in_features, module.in_features) for name, module in linears.items()}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].flatten(0, -2).float()
            sums[name] = sums[name].to(x.device) + x.T @ x

        return add

    handles = [module.register_forward_hook(watch(name)) for name, module in linears.items()]
    run()
    for handle in handles:
        handle.remove()
    return sums


@torch.no_grad()
def quantise(model: LlamaForCausalLM, calibrate: Callable[[], None]) -> dict[str, Tensor]:
    """Round every linear of the decoder layers in place and return the checkpoint's tensors.

    `calibrate` sends typical text through the model. It runs once a layer, so that each layer is fitted to what the
    rounded layers before it really give.
    """
    tensors: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for name, hessian in hessians(linears, calibrate).items():
            packed = pack(*round_to_4_bits(linears[name].weight, hessian))
            linears[name].weight.copy_(unpack(packed))
            tensors |= {f"model.layers.{i}.{name}.{part}": tensor for part, tensor in packed.items()}
    for name, parameter in model.named_parameters():
        if "proj" not in name:
            parameter.copy_(parameter.half())
            tensors[name] = parameter.detach().half().cpu().contiguous()
    return tensors


def save(tensors: dict[str, Tensor], config: dict[str, object], folder: Path) -> None:
    """Write model.safetensors and config.json."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    full = config | {"quantization_config": QUANTIZATION_CONFIG}
    (folder / "config.json").write_text(json.dumps(full, indent=2) + "\n")


def load(folder: Path) -> LlamaForCausalLM:
    """The model of a folder that `save` wrote, its 4-bit weights turned back into float32."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    weights = {name: tensor.float() for name, tensor in tensors.items() if name.endswith(".weight")}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        weights[f"{name}.weight"] = unpack({part: tensors[f"{name}.{part}"] for part in
                                            ("qweight", "qzeros", "scales", "g_idx")})  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**config, name_or_path="lorayard-demo")).float()
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return model.eval()
