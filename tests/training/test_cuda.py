"""The kernels for NVIDIA GPUs, compiled for the CPU and run thread by thread: 32 threads are a warp, which waits for
each other wherever it exchanges registers. Their speed and bfloat16 are seen on a GPU only (benchmarks/gpu.py)."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from lab.machine.backend import mx
from lab.training import cuda, kernels

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")

SHIM = """
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>
#define __device__
using std::min;
using T = float;
namespace mlx::core::cu {
template <typename T, int N> struct AlignedVector {
  T val[N];
  T& operator[](int i) { return val[i]; }
  T operator[](int i) const { return val[i]; }
};
template <int N, typename T> AlignedVector<T, N> load_vector(const T* from, uint32_t offset) {
  AlignedVector<T, N> result;
  for (int i = 0; i < N; i++) result[i] = from[offset * N + i];
  return result;
}
template <int N, typename T> void store_vector(T* to, uint32_t offset, const AlignedVector<T, N>& values) {
  for (int i = 0; i < N; i++) to[offset * N + i] = values[i];
}
}
struct Index { unsigned x; };
thread_local Index blockIdx, threadIdx;
static Index blockDim{256};
static float exchanged[32];
static std::barrier<>* meeting;
float __shfl_xor_sync(unsigned, float value, int distance) {
  const int lane = threadIdx.x % 32;
  exchanged[lane] = value;
  meeting->arrive_and_wait();
  const float result = exchanged[lane ^ distance];
  meeting->arrive_and_wait();
  return result;
}
float rsqrt(float x) { return 1 / std::sqrt(x); }
"""
GRID = """
extern "C" void grid(void** arrays, const int** shapes, int warps) {
  for (int warp = 0; warp < warps; warp++) {
    std::barrier<> all(32);
    meeting = &all;
    std::vector<std::thread> threads;
    for (int lane = 0; lane < 32; lane++) {
      threads.emplace_back([=, &all] {
        blockIdx.x = warp * 32 / 256;
        threadIdx.x = warp * 32 % 256 + lane;
        mlx::core::cu::kernel(ARGUMENTS);
        all.arrive_and_drop();
      });
    }
    for (auto& thread : threads) thread.join();
  }
}
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """name, D -> the kernel's library, compiled once."""
    folder, loaded = tmp_path_factory.mktemp("cuda"), {}

    def library(name: str, channels: int) -> ctypes.CDLL:
        if (name, channels) not in loaded:
            inputs, outputs, body = cuda.KERNELS[name]
            kinds = [f"const float* {one}" for one in inputs] + [f"float* {one}" for one in outputs]
            kinds += [f"const int* {one}_shape" for one in inputs]
            values = [f"(float*)arrays[{i}]" for i in range(len(inputs) + len(outputs))]
            values += [f"shapes[{i}]" for i in range(len(inputs))]
            constants = f"constexpr int D = {channels}, RUN = {cuda.RUN};"
            kernel = f"void kernel({', '.join(kinds)}) {{ {constants} {body} }}"
            path = folder / f"{name}{channels}.cpp"
            kernel = f"namespace mlx::core::cu {{ {kernel} }}"
            path.write_text(SHIM + cuda.HEADER + kernel + GRID.replace("ARGUMENTS", ", ".join(values)))
            command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", str(path), "-o"]
            subprocess.run([*command, str(path.with_suffix(".so"))], check=True, timeout=120)
            loaded[name, channels] = ctypes.CDLL(str(path.with_suffix(".so")))
        return loaded[name, channels]

    return library


@pytest.fixture
def on_cpu(libraries, monkeypatch):
    def run(name: str, inputs: list, threads: int, outputs: list) -> list:
        given = [np.array(one, np.float32) for one in inputs]
        made = [np.full(shape, np.nan, np.float32) for shape, _ in outputs]  # every element must be written
        arrays = (ctypes.c_void_p * len(given + made))(*(one.ctypes.data for one in given + made))
        sizes = [(ctypes.c_int * one.ndim)(*one.shape) for one in given]
        shapes = (ctypes.POINTER(ctypes.c_int) * len(sizes))(
            *(ctypes.cast(one, ctypes.POINTER(ctypes.c_int)) for one in sizes)
        )
        blocks = -(-threads // cuda.BLOCK)
        libraries(name, inputs[0].shape[-1]).grid(arrays, shapes, blocks * cuda.BLOCK // 32)
        return [mx.array(one) for one in made]

    monkeypatch.setattr(cuda, "run", run)


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def norm(x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, None, 1e-6)


def same(ours, plain, *inputs: mx.array) -> None:
    """Values and gradients of two functions of these inputs."""
    weight = random(*plain(*inputs).shape, seed=9)
    every = tuple(range(len(inputs)))
    got, expected = (mx.value_and_grad(lambda *t, f=f: (f(*t) * weight).sum(), every)(*inputs) for f in (ours, plain))
    for a, b in zip([ours(*inputs), *got[1]], [plain(*inputs), *expected[1]], strict=True):
        assert np.array(a) == pytest.approx(np.array(b), abs=3e-5, rel=1e-4)


@pytest.mark.parametrize("shape", [(2, 40, 16), (3, 1, 8), (1, 33, 64)])
def test_smear(on_cpu, shape):
    def plain(x, shares):
        return x + shares * mx.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))

    same(cuda.smear, plain, random(*shape), random(shape[-1], seed=1))


@pytest.mark.parametrize("shape", [(2, 9, 3, 16), (1, 40, 2, 64), (2, 5, 1, 128)])
def test_rotary_norm(on_cpu, shape):
    def plain(x):
        x = x.transpose(0, 2, 1, 3)
        x = mx.fast.rope(x, dims=shape[-1], traditional=False, base=100.0, scale=1.0, offset=0)
        return norm(x).transpose(0, 2, 1, 3)

    same(lambda x: cuda.rotary_norm(x, 100.0), plain, random(*shape))


@pytest.mark.parametrize("shape", [(2, 9, 3, 16), (1, 20, 2, 64)])
def test_without_own(on_cpu, shape):
    def plain(y, v):
        own = norm(v)
        return y - (y * own).mean(-1, keepdims=True) * own

    same(cuda.without_own, plain, random(*shape), random(*shape, seed=1))


def test_what_the_kernels_cannot_compute_is_left_to_mlx(monkeypatch):
    """An experiment may have fewer heads for values, wider ones, another dtype, or no heads at all."""
    called = []
    for name in ("smear", "rotary_norm", "without_own"):
        monkeypatch.setattr(cuda, name, lambda x, *_, name=name: called.append(name) or x)
    monkeypatch.setattr(kernels, "CUDA", True)
    heads, one = random(2, 3, 4, 32), random(2, 1, 4, 32)
    kernels.without_own(heads, one)
    kernels.without_own(heads, heads.astype(mx.bfloat16))
    kernels.without_own(random(3, 4, 32), random(3, 4, 32))
    kernels.rotary_norm(random(2, 3, 4, 24), 100.0)
    kernels.smear(random(2, 3, 12), random(12))
    kernels.smear(random(2, 3, 16), random(1, 16))
    assert called == []
    kernels.without_own(heads, heads), kernels.rotary_norm(heads, 100.0), kernels.smear(random(2, 3, 16), random(16))
    assert called == ["without_own", "rotary_norm", "smear"]
