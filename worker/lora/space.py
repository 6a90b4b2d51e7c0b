"""What LoRA slots take of a model's memory, by the headers of the adapters alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorayard.kernels.linear import STEP
from lorayard.shared.errors import LorayardError

from ..models.config import ModelConfig
from ..models.model import linear_shapes
from .config import OUTPUT
from .contents import Contents
from .folders import scan
from .packed import rank_class


@dataclass(frozen=True, slots=True)
class SlotSpace:
    """modules: bytes of one slot at each module, those of the adapter that takes most there.

    rank: class of the largest rank. files: bytes of each adapter's weights file. problems: a sentence for each adapter
    that was passed over.
    """

    modules: Mapping[str, int]
    rank: int
    files: tuple[int, ...]
    problems: tuple[str, ...]


def slot_space(config: ModelConfig, roots: Sequence[Path], itemsize: int) -> SlotSpace:
    """For the adapters below the roots; without any, for one of the smallest class on every linear of the layers.

    A combination of several adapters is of the class of their ranks' sum, and takes more than one of them.
    """
    folders = scan(roots)
    problems, files = folders.problems, []
    rank, modules = 0, dict[str, int]()
    for folder in folders.values():
        try:
            contents = Contents.of(folder.path, config)
        except LorayardError as reason:
            problems.append(str(reason))
            continue
        files.append(folder.bytes)
        rank = max(rank, rank_class(max(contents.ranks.values())))
        for module, size in contents.module_bytes(itemsize).items():
            modules[module] = max(size, modules.get(module, 0))
    if not files:
        rank, shapes = STEP, [shape for shape in linear_shapes(config) if shape.name != OUTPUT]
        modules = {shape.name: STEP * (shape.in_features + shape.out_features) * itemsize for shape in shapes}
    return SlotSpace(modules, rank, tuple(sorted(files, reverse=True)), tuple(problems))
