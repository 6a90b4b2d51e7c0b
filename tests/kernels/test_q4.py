"""The layout of 4-bit weights, which must lose nothing, and what a launch refuses."""

from __future__ import annotations

import re

import pytest
import torch

from lorayard.kernels import launch, linear_gptq, linear_q4, q4
from lorayard.kernels.rms_norm import add_norm, add_norm_arranged
from lorayard.kernels.silu_mul import silu_mul, silu_mul_arranged

from .case import NAMES, cases_of
from .cases.q4_decode import gptq

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")


@pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (640, 88), (1280, 192)])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 640, -1])
def test_weights_come_back_as_they_were(inputs, outputs, group):
    group = inputs if group == -1 else group
    if inputs % group:
        pytest.skip("groups of unequal size")
    for ordered, symmetric in ((True, True), (False, False)):
        tensors = gptq(inputs, outputs, group, ordered, symmetric, "cpu")
        tensors[2][0, 0], tensors[2][:, 1], tensors[2][-1, 2] = -0.01, 0, 6e-8  # negative, a row of zeros, subnormal
        packed = q4.pack(*tensors)
        assert packed is not None and (packed.zeros is None) == symmetric
        assert torch.equal(q4.dequantise(packed), linear_gptq.dequantise(*tensors))
        x, bias = torch.randn(3, inputs).half(), torch.randn(outputs).half()
        torch.testing.assert_close(linear_q4.linear_q4(x, packed, bias), x @ linear_gptq.dequantise(*tensors) + bias,
                                   rtol=2e-3, atol=2e-2)  # fmt: skip


def test_what_does_not_fit_is_left_to_torch():
    assert q4.pack(*gptq(192, 64, 64, True, True, "cpu")) is None, "K is no multiple of 128"
    words, zeros, scales, group = gptq(256, 64, 128, True, True, "cpu")
    assert q4.pack(words, zeros, scales.float(), group) is None, "scales of 32 bits"
    assert q4.pack(words.repeat(2, 1), zeros, scales, group) is None, "8 bits"
    group[0] = 1
    assert q4.pack(words, zeros, scales, group) is None, "groups of unequal size"


def test_a_launch_names_the_tensor_that_is_wrong():
    packed = q4.pack(*gptq(128, 64, 128, True, True, "cpu"))
    x, y = torch.zeros(2, 128).half(), torch.zeros(2, 64).half()
    for wrong, message in (
        ({"x": x.float()}, "x must be float16 [2, 128], but is torch.float32"),
        ({"y": y[:1]}, "y must be float16 [2, 64]"),
        ({"y": torch.zeros(64, 2).half().T}, "y must be contiguous"),
        ({"bias": torch.zeros(63).half()}, "bias must be float16 [64]"),
    ):
        arguments = {"x": x, "q4": packed, "bias": None, "y": y} | wrong
        with pytest.raises(ValueError, match=re.escape(message)):
            linear_q4.decode(**arguments)


@pytest.mark.parametrize("tokens", [17, 64, 65, 128, 256])
def test_every_batch_has_a_ring_of_two_stages_in_its_shared_memory(tokens):
    for inputs, outputs in ((512, 64), (4096, 512), (14336, 64)):
        for group in (16, 128):
            packed = q4.pack(*gptq(inputs, outputs, group, True, False, "cpu"))
            main = linear_q4.mid(torch.zeros(tokens, inputs).half(), packed, None)[0][1]
            macros = dict(main.kernel.macros)
            assert macros["STAGES"] >= 2 and main.shared <= linear_q4.SHARED[macros["BLOCKS"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_compiles_for_every_architecture_without_spills(name):
    """Needs no GPU, only `pip install cupy-cuda13x nvidia-cuda-nvrtc`, which are too large to ask of everybody."""
    pytest.importorskip("cupy", exc_type=ImportError)
    kernels = {each.kernel for case in cases_of(name).odd("cpu") for each in case.launches if each.kernel.name == name}
    for kernel in kernels:
        for architecture in ARCHITECTURES[-1:] if kernel.hopper else ARCHITECTURES:
            try:
                _, log = launch.compile_kernel(kernel, architecture)
            except RuntimeError as error:
                if "libnvrtc" not in str(error):
                    raise
                pytest.skip("libnvrtc is not installed")
            assert "0 bytes spill stores, 0 bytes spill loads" in log
            assert "serialized" not in log, "wgmma waits for itself"


def test_a_folder_that_others_can_write_holds_no_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find = launch._cache_folder.__wrapped__
    folder = find()
    assert folder == tmp_path / "lorayard" / "kernels" and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="no folder that only this user can write"):
        other = find()
    assert other != folder
    other.rmdir()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("ordered", [True, False])
def test_a_linear_on_the_gpu_is_right_in_every_family(ordered):
    tensors = gptq(2048, 320, 128, ordered, ordered, "cuda")
    packed = q4.pack(*tensors)
    x, bias = torch.randn(300, 2048, device="cuda").half(), torch.randn(320, device="cuda").half()
    value = x.double() @ linear_gptq.dequantise(*tensors).double() + bias.double()
    first = {}  # type: ignore[var-annotated]
    for tokens in (1, 8, 9, 40, 65, 128, 129, 200, 256, 300):
        y = linear_q4.linear_q4(x[:tokens], packed, bias)
        assert ((y.double() - value[:tokens]).norm() / value[:tokens].norm()).item() < 4e-4
        family = sum(tokens > last for last in (linear_q4.FEW, 128, linear_q4.MANY))
        assert torch.equal(first.setdefault(family, y[0]), y[0]), f"{tokens} tokens"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_linears_of_q4_mid_hand_over_images_and_parts():
    down, up = (q4.pack(*gptq(*sizes, 128, True, True, "cuda")) for sizes in ((2048, 256), (256, 512)))
    gate, h, weight = (torch.randn(n, k, device="cuda").half() for n, k in ((40, 4096), (40, 256), (1, 256)))
    if not linear_q4.takes_arranged(h, up):
        pytest.skip("not a Hopper")
    total, x = add_norm_arranged(
        linear_q4.linear_q4_parts(silu_mul_arranged(*gate.chunk(2, -1)), down, None), h, weight[0], 1e-5
    )
    plain = linear_q4.linear_q4(silu_mul(*gate.chunk(2, -1)), down, None)
    expected, normal = add_norm(plain, h, weight[0], 1e-5)
    assert torch.equal(total, expected) and torch.equal(x.rows, normal)
    assert torch.equal(linear_q4.linear_q4(x, up, None), linear_q4.linear_q4(normal, up, None))
