"""The CPU's own kernels and the chunked cross-entropy, against MLX's plain operations and their gradients."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lab.machine.backend import mx, nn
from lab.training import kernels


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def close(ours, theirs, tolerance: float = 2e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert np.array(a) == pytest.approx(np.array(b), abs=tolerance, rel=1e-4)


def plain_attention(q, k, v, scale, window):
    mask = kernels.window_mask(q.shape[2], window)
    groups = q.shape[1] // k.shape[1]
    k, v = mx.repeat(k, groups, axis=1), mx.repeat(v, groups, axis=1)
    scores = mx.where(mask, scale * q @ k.swapaxes(-1, -2), -mx.inf)
    return mx.softmax(scores, axis=-1) @ v


@pytest.mark.parametrize("length", [1, 16, 128, 200, 300])
@pytest.mark.parametrize("window", [None, 1, 7, 128, 150])
def test_attention_and_its_gradients(length, window):
    q, k, v, weight = (random(3, 2, length, 16, seed=i) for i in range(4))

    def ours(q, k, v):
        return (kernels.attention(q, k, v, scale=0.3, window=window) * weight).sum()

    def theirs(q, k, v):
        return (plain_attention(q, k, v, 0.3, min(window or length, length)) * weight).sum()

    value, gradients = mx.value_and_grad(ours, (0, 1, 2))(q, k, v)
    expected, expected_gradients = mx.value_and_grad(theirs, (0, 1, 2))(q, k, v)
    close([value], [expected], 1e-3)
    close(gradients, expected_gradients)


def test_attention_with_fewer_keys_than_queries():
    q, k, v = random(2, 6, 20, 8), random(2, 2, 20, 8, seed=1), random(2, 2, 20, 8, seed=2)
    gradients = mx.grad(lambda *t: mx.square(kernels.attention(*t, scale=0.5)).sum(), (0, 1, 2))(q, k, v)
    expected = mx.grad(lambda *t: mx.square(plain_attention(*t, 0.5, 20)).sum(), (0, 1, 2))(q, k, v)
    close(gradients, expected)


@pytest.mark.parametrize("metal", [False, True])
def test_attention_with_values_wider_than_queries(metal, monkeypatch):
    monkeypatch.setattr(kernels, "GPU", metal)
    q, k, v = random(2, 2, 20, 8), random(2, 2, 20, 8, seed=1), random(2, 2, 20, 24, seed=2)
    gradients = mx.grad(lambda *t: mx.square(kernels.attention(*t, scale=0.5, window=7)).sum(), (0, 1, 2))(q, k, v)
    expected = mx.grad(lambda *t: mx.square(plain_attention(*t, 0.5, 7)).sum(), (0, 1, 2))(q, k, v)
    close(gradients, expected)


def test_attention_of_transposed_views_in_bfloat16():
    q, k, v = (random(2, 24, 2, 8, seed=i).astype(mx.bfloat16).transpose(0, 2, 1, 3) for i in range(3))
    y = kernels.attention(q, k, v, scale=0.5)
    assert y.dtype == mx.bfloat16
    close([y.astype(mx.float32)], [plain_attention(*(t.astype(mx.float32) for t in (q, k, v)), 0.5, 24)], 0.02)


def test_large_scores_do_not_overflow():
    q = 100 * random(1, 1, 40, 8)
    assert np.isfinite(np.array(kernels.attention(q, q, q, scale=1.0))).all()


@pytest.mark.parametrize("length", [1, 16, 100])
def test_a_gpus_call_is_the_same_attention(length, monkeypatch):
    """mx.fast runs on the CPU too: what the branch for GPUs asks of it."""
    q, k, v = (random(2, 2, length, 16, seed=i) for i in range(3))
    for window in (None, 5):
        ours = kernels.attention(q, k, v, scale=0.3, window=window)
        monkeypatch.setattr(kernels, "GPU", True)
        close([ours], [kernels.attention(q, k, v, scale=0.3, window=window)])
        monkeypatch.undo()


def plain_loss(x, head, targets, cap):
    logits = (x @ head.T).reshape(-1, len(head))
    logits = cap * mx.tanh(logits / cap) if cap else logits
    return nn.losses.cross_entropy(logits, targets.reshape(-1), reduction="mean")


@pytest.mark.parametrize("cap", [0.0, 3.0, 15.0, 60.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 16), (3, 300)])
@pytest.mark.parametrize("form", ["cpu", "whole", "chunked", "compiled"])
def test_cross_entropy_and_its_gradients(cap, shape, form, monkeypatch):
    x, head = random(*shape, 12), 2 * random(50, 12, seed=1)
    targets = mx.random.randint(0, 50, shape, key=mx.random.key(2))
    monkeypatch.setattr(kernels, "GPU", form != "cpu")
    if form in ("chunked", "compiled"):
        monkeypatch.setattr(kernels, "CHUNK_LOGITS", 50 * 7)

    def ours(x, head):
        return 3 * kernels.linear_cross_entropy(x, head, targets, cap)

    ours = mx.value_and_grad(ours, (0, 1))
    value, gradients = (mx.compile(ours) if form == "compiled" else ours)(x, head)
    expected, expected_gradients = mx.value_and_grad(lambda x, h: 3 * plain_loss(x, h, targets, cap), (0, 1))(x, head)
    close([value], [expected])
    close(gradients, expected_gradients)


@pytest.mark.parametrize(("cap", "loss"), [(0.0, 1e4), (kernels.SAFE_CAP, 50.0), (1000.0, 1000.0)])
def test_cross_entropy_of_sure_logits_is_finite(cap, loss):
    x, head = 1e4 * mx.eye(4), mx.eye(4)
    value, gradients = mx.value_and_grad(lambda x: kernels.linear_cross_entropy(x, head, mx.arange(4)[::-1], cap))(x)
    assert value.item() == pytest.approx(loss)
    assert np.isfinite(np.array(gradients)).all()


def test_cross_entropy_is_the_same_in_every_run():
    x, head, targets = random(2000, 16), random(64, 16, seed=1), mx.random.randint(0, 64, (2000,))
    gradient = mx.grad(lambda h: kernels.linear_cross_entropy(x, h, targets, 15.0))
    first = np.array(gradient(head))
    assert all((np.array(gradient(head)) == first).all() for _ in range(5))


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_softcap_and_its_gradient(cap):
    x = 3 * random(5, 7)
    plain = (lambda x: cap * mx.tanh(x / cap)) if cap else (lambda x: x)
    close([kernels.softcap(x, cap)], [plain(x)])
    close(
        [mx.grad(lambda x: mx.square(kernels.softcap(x, cap)).sum())(x)],
        [mx.grad(lambda x: mx.square(plain(x)).sum())(x)],
    )
    assert kernels.softcap(x.astype(mx.bfloat16), cap).dtype == mx.float32


HUGE = """
import re
from lab.machine.backend import mx
import numpy as np

array = mx.ones((4096, 1024))
mx.eval(array)
address, inside = np.asarray(array).ctypes.data, False
for line in open("/proc/self/smaps"):
    if match := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(match[1], 16) <= address < int(match[2], 16)
    if inside and line.startswith("VmFlags"):
        print(line)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="the heap is not glibc's, or the kernel has no huge pages",
)
def test_arrays_lie_where_the_kernel_may_use_huge_pages():
    here = Path(kernels.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, cwd=here, check=True)
    assert "hg" in done.stdout.split()
