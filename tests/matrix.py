"""The parity matrix: every architecture x weight format x LoRA feature against transformers and peft in float32.

The axes are the registries: `ARCHITECTURES`, `PACKERS`, `FEATURES`, so what is added there joins by itself.
`python -m tests.matrix` from the checkout measures all of it and writes docs/parity.md.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.models.architectures import ARCHITECTURES

from .features import FEATURES, write_feature
from .packers import PACKERS, pack_model
from .stepper import Sequence as Text
from .stepper import Stepper
from .tiny import reference, reference_logits, relative, with_adapters, write_model

PROMPT = torch.randint(3, 160, (70,), generator=torch.Generator().manual_seed(3)).tolist()
NEW = 64
SETS: dict[str, list[tuple[str, float]]] = {
    "base": [],
    **{feature: [(feature, 1.0)] for feature in FEATURES},
    "weighted sum": [("linears", 0.7), ("rslora", -0.4)],
    "sum with embedding and head": [("embedding and head", 0.5), ("patterns", -1.5)],
}
"""LoRA sets by name: every feature alone, and sums."""
MAIN = ("fp32", "gptq-4bit", "awq", "exl2")
"""Formats that are tried with every set; the other flavours, with the base and one adapter."""
FEW = ("base", "linears")
MARGIN = 1e-3
"""Two best logits that are nearer than this may change places."""
Case = tuple[str, str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Figures:
    """error: relative, of the logits. moved: how far the set moves them. wrong: greedy tokens that differ though the
    margin allows none. same_bits: the rows of a mixed batch have the bits that they get alone, in one piece."""

    error: float
    moved: float
    wrong: int
    same_bits: bool

    @property
    def passes(self) -> bool:
        return self.error < 1e-3 and self.moved > 1e-2 and not self.wrong and self.same_bits


def cases() -> list[Case]:
    """(architecture, format, sets) of the whole matrix."""
    return [(a, form, tuple(SETS) if form in MAIN else FEW) for a in ARCHITECTURES for form in PACKERS]


def slice_of_cases() -> list[Case]:
    """Every architecture with every main format; each meets some of the sets, and every set is met."""
    pairs = [(a, form) for a in ARCHITECTURES for form in MAIN]
    return [(a, form, ("base", *list(SETS)[1 + i :: len(pairs)])) for i, (a, form) in enumerate(pairs)]


def measure(root: Path, case: Case) -> dict[str, Figures]:
    """The figures of each set of the case, in the empty folder `root`."""
    architecture, form, names = case
    flags = {"attention_bias", "mlp_bias"} & ARCHITECTURES[architecture].defaults.keys()
    base = write_model(root / "base", 5, architecture=architecture, **dict.fromkeys(flags, True))
    pack_model(base, root / "packed", root / "exact", [form])
    used = {feature for name in names for feature, _ in SETS[name]}
    adapters = {
        name: write_feature(root / f"a{i}", root / "exact", name, i) for i, name in enumerate(FEATURES) if name in used
    }
    model = Model(ModelConfig.from_directory(root / "packed"))
    model.load(devices="cpu")
    loras = {name: Lora.from_directory(model, path) for name, path in adapters.items()}
    sets = [[(loras[feature], scale) for feature, scale in SETS[name]] for name in names]
    exact = reference(root / "exact", [])
    figures = {}
    for name, pairs, (text, logits) in zip(names, sets, greedy(model, sets), strict=True):
        paths = [(adapters[feature], scale) for feature, scale in SETS[name]]
        expected = reference_logits(with_adapters(copy.deepcopy(exact), paths), text)
        alone = model.logits(text, pairs)
        best = expected[len(PROMPT) - 1 :].topk(2).values
        clear = best[:, 0] - best[:, 1] > MARGIN
        chosen = expected[len(PROMPT) - 1 :].argmax(-1)
        wrong = int((clear[:-1] & (chosen[:-1] != torch.tensor(text[len(PROMPT) :]))).sum())
        moved = relative(alone, model.logits(text)) if pairs else float("inf")
        figures[name] = Figures(relative(alone, expected), moved, wrong, torch.equal(alone[:-1], logits))
    return figures


def greedy(model: Model, sets: Sequence[list[tuple[Lora, float]]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Prompt with NEW greedy tokens, and the logits of all but the last, for each set, all in one batch."""
    stepper = Stepper(model, 256 * len(sets), slots=len(sets))
    rows, feeds = [Text(pairs) for pairs in sets], [PROMPT for _ in sets]
    texts, logits = [list(PROMPT) for _ in sets], [[] for _ in sets]  # type: ignore[var-annotated]
    for _ in range(NEW):
        for i, part in enumerate(stepper.step(list(zip(rows, feeds, strict=True)))):
            logits[i].append(part)
            texts[i].append(int(part[-1].argmax()))
        feeds = [text[-1:] for text in texts]
    return ((text, torch.cat(parts)) for text, parts in zip(texts, logits, strict=True))


def table(figures: dict[tuple[str, str, str], Figures]) -> str:
    """docs/parity.md, of the figures by architecture, format and set."""
    worst = max(each.error for each in figures.values())
    least = min(each.moved for each in figures.values())
    lines = [
        "# Parity", "",
        "Written by `python -m tests.matrix`. Each figure is the relative error of the logits over a prompt of "
        f"{len(PROMPT)} tokens and {NEW} greedy ones, against transformers and peft in float32 over the same "
        "dequantised weights. All adapters' tensors are random.", "",
        f"{len(figures)} cases; {sum(each.passes for each in figures.values())} pass: error under 1e-3, the set moves "
        f"the logits by more than 1e-2, all {NEW} greedy tokens are the reference's (where its two best logits are "
        f"more than {MARGIN:g} apart), and a batch of all sets of a table's column gives each row the very bits that "
        "it gets alone in one piece (CPU).", "",
        f"Largest error {worst:.0e}; the set that moves the logits least moves them by {least:.2f}.", "",
    ]  # fmt: skip
    for architecture in ARCHITECTURES:
        lines += ["", f"## {architecture}", ""]
        lines += _rows("LoRA set", [(n, [figures[architecture, f, n] for f in MAIN]) for n in SETS], MAIN)
        rest = [form for form in PACKERS if form not in MAIN]
        lines += ["", *_rows("format", [(f, [figures[architecture, f, n] for n in FEW]) for f in rest], FEW)]
    return "\n".join(lines) + "\n"


def _rows(corner: str, rows: list[tuple[str, list[Figures]]], columns: Sequence[str]) -> list[str]:
    yield_ = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return yield_ + [
        f"| {name} | " + " | ".join(f"{each.error:.0e}" if each.passes else "**fails**" for each in cells) + " |"
        for name, cells in rows
    ]


def main() -> int:
    """Measure everything, write docs/parity.md; 1 if a case fails."""
    figures: dict[tuple[str, str, str], Figures] = {}
    for case in cases():
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as root:
            found = measure(Path(root), case)
        figures |= {(case[0], case[1], name): each for name, each in found.items()}
        failed = [f"{name}: {each}" for name, each in found.items() if not each.passes]
        sys.stdout.write(f"{case[0]} {case[1]} {time.monotonic() - start:.1f} s {failed or 'ok'}\n")
        sys.stdout.flush()
    (Path(__file__).parent.parent / "docs" / "parity.md").write_text(table(figures))
    return int(not all(each.passes for each in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
