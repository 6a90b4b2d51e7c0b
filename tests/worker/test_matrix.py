"""The parity matrix: a slice of it, all of it with LORAYARD_NIGHTLY=1, and that docs/parity.md has every case."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lorayard.worker.linear.formats import FORMATS
from lorayard.worker.models.architectures import ARCHITECTURES

from ..matrix import MAIN, SETS, Case, cases, measure, slice_of_cases
from ..packers import PACKERS
from ..tiny import FAMILIES

NIGHTLY = bool(os.environ.get("LORAYARD_NIGHTLY"))
CHOSEN = cases() if NIGHTLY else slice_of_cases()
PARITY = Path(__file__).parents[2] / "docs" / "parity.md"


@pytest.mark.parametrize("case", CHOSEN, ids=[f"{a}, {form}" for a, form, _ in CHOSEN])
def test_parity(case: Case, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name, figures in measure(tmp_path, case).items():
        assert figures.passes, (case, name, figures)


def test_the_slice_meets_every_name() -> None:
    architectures, formats, sets = (set(names) for names in zip(*slice_of_cases(), strict=True))
    assert architectures == set(ARCHITECTURES) == set(FAMILIES) and formats == set(MAIN)
    assert {name for names in sets for name in names} == set(SETS)


def test_every_format_of_the_engine_is_a_main_one() -> None:
    modules = {each.__name__.rpartition(".")[2] for each in FORMATS}  # type: ignore[attr-defined]
    assert modules == {{"fp32": "dense"}.get(form, form.partition("-")[0]) for form in MAIN}
    assert set(MAIN) <= set(PACKERS)


def test_the_document_has_every_case() -> None:
    sections = PARITY.read_text().split("\n## ")[1:]
    assert [section.partition("\n")[0] for section in sections] == list(ARCHITECTURES)
    for section in sections:
        rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")]
        assert [row[0] for row in rows] == ["LoRA set", *SETS, "format", *(f for f in PACKERS if f not in MAIN)]
        assert tuple(rows[0][1:]) == MAIN
        assert all(float(cell) < 1e-3 for row in rows if row[0] not in ("LoRA set", "format") for cell in row[1:])
