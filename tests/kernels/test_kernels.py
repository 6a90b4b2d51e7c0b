"""Every kernel against float64: on the CPU by the emulator, and on a GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch

from lorayard.kernels.launch import launch, usable

from . import emulator
from .case import NAMES, cases_of, check


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_right_on_the_emulator(name):
    if not emulator.available():
        message = f"{emulator.COMPILER} is missing, which compiles the kernels for the CPU; install it"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    torch.manual_seed(len(name))
    for case in cases_of(name).odd("cpu"):
        for i, one in enumerate(case.launches):
            emulator.run(one, seed=i)
        check(case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_right_on_the_gpu(name):
    torch.manual_seed(torch.seed() % 2**32)
    for case in cases_of(name).odd("cuda"):
        for one in case.launches:
            if one.kernel.hopper and not usable(case.expected[0][0], hopper=True):
                continue
            launch(one)
        torch.cuda.synchronize()
        check(case)
