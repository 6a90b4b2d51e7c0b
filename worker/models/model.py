"""A model: loaded layer by layer over devices, run one batch at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from lorayard.kernels.rms_norm import add_norm, rms_norm
from lorayard.shared.errors import ModelError, NotSupported, UsageError

from ..cache.storage import Cache
from ..linear import formats
from ..linear.linear import Linear, Shape
from ..linear.tensors import Tensors
from .adapters import Adapter, Bank
from .batch import Batch, LoraRows
from .config import ModelConfig
from .devices import Devices
from .layer import Layer, Step, layer_linears, layer_norms, read_norm
from .loading import in_order
from .memory import Needs, Wish, workspace
from .placement import Budget, find_budgets
from .rope import Rope

EMBED, HEAD = "model.embed_tokens", "lm_head"
"""Modules beside the layers' linears, by the names that PEFT gives them."""
EMBEDDING, NORM = f"{EMBED}.weight", "model.norm.weight"
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|(?!model\.|lm_head\.).*")
"""Tensors that are beside the point: old checkpoints' RoPE tables, and what another file format's names hold."""
SMALL_LINEAR = 1 << 20
"""Weights of a linear up to which a second CPU thread costs more than it brings."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers that follow each other on one device."""

    device: torch.device
    layers: list[int]


class Model:
    """A model. `load` before anything else; the CPU computes in float32, a GPU in fp16 or bf16."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.unload()

    def unload(self) -> None:
        """Give the memory back."""
        self.layers: list[Layer] = []
        self.linears: dict[str, Linear] = {}
        self.rope: dict[torch.device, dict[Rope, Tensor]] = {}
        self.dtype = torch.float32
        self.head: Linear | None = None
        self.embedding = self.norm = torch.empty(0)

    @property
    def layer_devices(self) -> tuple[torch.device, ...]:
        """The device of each layer; empty until the model is loaded."""
        return tuple(layer.device for layer in self.layers)

    def load(
        self,
        cache: Cache | None = None,
        devices: Devices = "auto",
        progress: Callable[[int, int], None] | None = None,
        slots: Mapping[str, int] | None = None,
    ) -> None:
        """Read the checkpoint onto `devices` (see placement.find_budgets), allocating `cache` beside the layers.

        slots: bytes to leave free for LoRA, by module, on the module's device. Everything is checked by the files'
        headers before memory is spent. Several layers are read at once; progress(done, total) is called with bytes
        after each part, in their order. A model of small linears on the CPU sets torch to one thread: its products are
        so short that threads would only wait for each other, on a busy machine for many times as long as they compute.

        Raises ModelError, NotSupported or UsageError; a model that failed to load holds nothing.
        """
        self.unload()
        budgets = find_budgets(devices)
        tensors = checkpoint(self.config)
        wish = Wish(cache.max_tokens, cache.dtype, 1) if cache is not None else Wish(slots=1)
        placed = needs(self.config, tensors, budgets, slots or {}).plan(wish, budgets).devices()
        self.dtype = compute_dtype(tensors, budgets)
        tensors.pinned = all(device.type == "cuda" for device in placed)
        if placed[0].type == "cpu" and self.config.hidden_size * self.config.intermediate_size <= SMALL_LINEAR:
            torch.set_num_threads(1)
        try:
            self._read(tensors, placed, cache, progress or (lambda done, total: None))
        except BaseException:
            self.unload()
            if cache is not None:
                cache.free()
            raise

    def _read(
        self, tensors: Tensors, placed: list[torch.device], cache: Cache | None, progress: Callable[[int, int], None]
    ) -> None:
        config = self.config
        stored = [tensors.stored_bytes(f"model.layers.{i}.") for i in range(config.num_layers)]
        head = tensors.stored_bytes("lm_head.") if has_head(config, tensors) else 0
        sizes = [tensors.stored_bytes(EMBEDDING), *stored, head]
        self.embedding = tensors.read(EMBEDDING).to(placed[0], self.dtype)
        progress(sizes[0], sum(sizes))
        tasks = [partial(Layer, config, tensors, i, device, self.dtype) for i, device in enumerate(placed[1:-1])]
        for i, layer in enumerate(in_order(tasks)):
            if cache is not None:
                cache.allocate(i, layer.device)
            self.layers.append(layer)
            self.linears |= {module.name: module for module in layer.linears.values()}
            progress(sum(sizes[: i + 2]), sum(sizes))
        self.norm = read_norm(config, tensors, NORM, placed[-1], self.dtype)
        if has_head(config, tensors):
            self.head = formats.read(tensors, head_shape(config), config.quantisation, placed[-1], self.dtype)
        else:
            self.head = Linear(head_shape(config), self.embedding.to(placed[-1]), None)
        frequencies = {rope: rope.frequencies(config.head_dim) for rope in set(config.ropes)}
        self.rope = {device: {rope: f.to(device) for rope, f in frequencies.items()} for device in set(placed)}
        progress(sum(sizes), sum(sizes))

    def forward(self, batch: Batch, cache: Cache, bank: Bank | None = None) -> Tensor:
        """Logits [L, vocab] on the head's device, of the tokens batch.logit_rows, in the dtype that `project` gives.

        K and V of every token are written into the cache before any attends. Token ids and positions must be in range:
        the caller checks them, a GPU does not.
        """
        if self.head is None:
            raise UsageError("the model is not loaded")
        steps = self._steps(batch, bank)
        h, delta = self.embed(batch.token_ids.to(self.embedding.device), bank, batch.loras), None
        for layer, pools in zip(self.layers, map(cache.__getitem__, range(len(self.layers))), strict=True):
            h, delta = h.to(layer.device), None if delta is None else delta.to(layer.device)
            h, delta = layer.forward(h, delta, steps[layer.device], *pools)
        rows = batch.logit_rows.to(h.device)
        delta = None if delta is None else delta[rows]
        uses = batch.logit_loras() if bank and bank.touches(HEAD, batch.loras) else ()
        return self.project(h[rows], delta, bank, uses)

    def embed(self, token_ids: Tensor, bank: Bank | None = None, loras: tuple[LoraRows, ...] = ()) -> Tensor:
        """The residual stream's beginning, [T, hidden], of int64 [T] on the embedding's device (see
        Architecture.gemma; the factor is rounded as transformers does), with what the slots do to it."""
        h = functional.embedding(token_ids, self.embedding)
        h = bank.embed(EMBED, token_ids, h, loras) if bank and loras else h
        if not self.config.architecture.gemma:
            return h
        return h.float() * float(torch.tensor(self.config.hidden_size**0.5, dtype=self.dtype))

    def project(
        self, h: Tensor, delta: Tensor | None, bank: Bank | None = None, loras: tuple[LoraRows, ...] = ()
    ) -> Tensor:
        """Logits [L, vocab], in the model's dtype or in float32, of the last layer's h and delta [L, hidden]."""
        assert self.head is not None
        h = h.to(self.norm.device)
        if delta is None:
            h = rms_norm(h, self.norm, self.config.norm_eps, self.dtype)
        else:
            _, h = add_norm(delta.to(h.device), h, self.norm, self.config.norm_eps, self.dtype)
        logits, cap = self.head(h), self.config.logit_cap
        if bank and loras:
            logits = bank.apply(HEAD, h, logits, bank.prepare(loras, h.device))
        return (logits.float() / cap).tanh() * cap if cap else logits

    @property
    def stages(self) -> list[Stage]:
        """What a token passes in order: layers of one device each, the embedding and the head where they are."""
        places = [(self.embedding.device, []), *((layer.device, [i]) for i, layer in enumerate(self.layers))]
        stages: list[Stage] = []
        for device, layers in [*places, (self.norm.device, [])]:
            if stages and stages[-1].device == device:
                stages[-1].layers.extend(layers)
            else:
                stages.append(Stage(device, list(layers)))
        return stages

    def _steps(self, batch: Batch, bank: Bank | None) -> dict[torch.device, Step]:
        windows = self.config.windows
        return {d: Step.of(batch, d, windows, self.rope[d], bank) for d in set(self.layer_devices)}

    def logits(
        self,
        token_ids: Sequence[int] | Tensor,
        loras: Sequence[Adapter | tuple[Adapter, float]] = (),
        cache_dtype: str | None = None,
    ) -> Tensor:
        """Logits, float32 [tokens, vocab] on the CPU, of each token of one text under one LoRA set.

        `loras`: adapters, or (adapter, scale) pairs. Uses a cache of its own, of the model's dtype if none is given.
        """
        ids = torch.as_tensor(token_ids, dtype=torch.int64).cpu()
        if ids.dim() != 1 or not 0 < len(ids) <= self.config.max_seq_len:
            raise UsageError(f"token_ids must be a list of 1 to {self.config.max_seq_len} ids")
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            raise UsageError(f"token ids must be between 0 and {self.config.vocab_size - 1}")
        own = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(self.dtype, "fp16")
        cache = Cache(self, len(ids), cache_dtype or own)
        rows, pages = torch.arange(len(ids)), torch.arange(cache.pages)[None]
        pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in loras]
        bank: Bank | None = None
        used: tuple[LoraRows, ...] = ()
        if pairs:
            bank, use = pairs[0][0].resident(self, pairs, rows)
            used = (use,)
        return self.forward(Batch(ids, rows, torch.zeros_like(rows), pages, rows, used), cache, bank).float().cpu()


def head_shape(config: ModelConfig) -> Shape:
    """The linear that gives logits."""
    return Shape(HEAD, config.hidden_size, config.vocab_size)


def has_head(config: ModelConfig, tensors: Tensors) -> bool:
    """Whether the head has weights of its own: EXL2 stores a quantised one beside a tied embedding."""
    return not config.tied_head or formats.is_packed(tensors, head_shape(config))


def linear_shapes(config: ModelConfig) -> list[Shape]:
    """Every linear: those of the layers, then the head."""
    return [*(s for i in range(config.num_layers) for s in layer_linears(config, i).values()), head_shape(config)]


def compute_dtype(tensors: Tensors, budgets: Sequence[Budget]) -> torch.dtype:
    """float32 where the CPU is among the devices; on GPUs bf16 for a checkpoint of bf16, else fp16."""
    if any(budget.device.type == "cpu" for budget in budgets):
        return torch.float32
    return torch.bfloat16 if tensors.entries[EMBEDDING].dtype == "BF16" else torch.float16


def needs(config: ModelConfig, tensors: Tensors, budgets: Sequence[Budget], slot: Mapping[str, int]) -> Needs:
    """What the checked tensors take on these devices, where a LoRA slot takes so many bytes of each module.

    A GPU keeps packed weights as they are stored; the CPU dequantises them.
    """
    dtype = compute_dtype(tensors, budgets)
    stored, held, by_format = Counter[str](), Counter[str](), Counter[str]()
    for name, entry in tensors.entries.items():
        stored[name.rpartition(".")[0]] += entry.size
    copied = len({budget.device for budget in budgets}) > 1
    for shape in linear_shapes(config):
        if shape.name == HEAD and not has_head(config, tensors) and not copied:
            continue  # the embedding itself
        kept = dtype != torch.float32 and formats.is_packed(tensors, shape)
        size = stored[shape.name] if kept else (shape.in_features + shape.bias) * shape.out_features * dtype.itemsize
        held[_part(shape.name)] += size
        by_format[formats.name_of(tensors, shape) if kept else "float"] += size
    for i in range(config.num_layers):
        held[f"layer {i}"] += sum(size for _, size in layer_norms(config, i).values()) * dtype.itemsize
    held["embedding"] = config.vocab_size * config.hidden_size * dtype.itemsize
    by_format["float"] = sum(held.values()) - sum(by_format.values()) + by_format["float"]
    slots = Counter[str]()
    for module, size in slot.items():
        slots[_part(module)] += size
    names = ["embedding", *(f"layer {i}" for i in range(config.num_layers)), "head"]
    on_gpu = any(budget.device.type == "cuda" for budget in budgets)
    return Needs(
        tuple(held[name] for name in names), by_format, tuple(slots[name] for name in names), config.num_kv_heads,
        config.head_dim, workspace(config, dtype.itemsize) if on_gpu else 0,
    )  # fmt: skip


def _part(module: str) -> str:
    """The part of the model that a module belongs to."""
    layer = re.match(r"model\.layers\.(\d+)\.", module)
    return f"layer {layer[1]}" if layer else {EMBED: "embedding", HEAD: "head"}[module]


def checkpoint(config: ModelConfig) -> Tensors:
    """The model folder's tensors, all there and of the right shapes. index.json is not read: it may be stale.

    Raises ModelError or NotSupported naming the tensor; a tensor that the model would not use is refused too, since
    leaving it out would change the results.
    """
    paths = sorted(config.path.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{config.path} holds no *.safetensors; other weight files are not read")
    tensors = Tensors(paths, ModelError)
    shapes = linear_shapes(config)
    if not has_head(config, tensors):
        shapes.remove(head_shape(config))
    tensors.require(EMBEDDING, (config.vocab_size, config.hidden_size))
    for shape in shapes:
        formats.check(tensors, shape, config.quantisation)
    norms = {NORM: config.hidden_size}
    for i in range(config.num_layers):
        norms |= dict(layer_norms(config, i).values())
    for name, size in norms.items():
        tensors.require(name, (size,))
    _refuse_unused(tensors, {EMBEDDING, *norms}, shapes, config.tied_head)
    return tensors


def _refuse_unused(tensors: Tensors, names: set[str], shapes: Sequence[Shape], tied: bool) -> None:
    known = {*names, *(["lm_head.weight"] if tied else ())}
    for shape in shapes:
        known |= {f"{shape.name}.{part}" for part in formats.parts(tensors, shape)}
    for name, entry in tensors.entries.items():
        if name not in known and not IGNORED.fullmatch(name):
            if name.endswith(".bias") and not tensors.read(name).any():
                continue
            raise NotSupported(f"{entry.path}: tensor {name} has no place in the model that config.json describes")
