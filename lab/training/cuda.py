"""Three operations of a GPT as kernels of an NVIDIA GPU, which read their inputs once; plain MLX takes several passes.

`lab.training.kernels` calls them. A thread has GROUP neighbouring channels, so that a warp reads whole lines; the
threads of a head sum over it by exchanging registers. The sources are compiled at their first use and are the same for
all batch sizes and lengths. tests/training/test_cuda.py runs them on the CPU, thread by thread.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from lab.machine.backend import mx

GROUP = 8  # channels of a thread: 16 bytes of bfloat16
BLOCK = 256  # threads of a block
RUN = 64  # rows of a thread that sums over rows

# The index of this thread, and the sum over the threads of one head, which are neighbours.
HEADER = f"""
#define GROUP {GROUP}
#define EPSILON 1e-6f  // as train.py's norm
#define THREAD (blockIdx.x * blockDim.x + threadIdx.x)
__device__ inline float sum_of_head(float value, int threads) {{
  for (int distance = 1; distance < threads; distance *= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}}
"""

# x (B, T, C) plus a share (C,) of the row before.
SMEAR = """
  const int length = x_shape[1], groups = x_shape[2] / GROUP;
  const int row = THREAD / groups, part = THREAD % groups;
  if (row >= x_shape[0] * length) return;
  auto now = load_vector<GROUP>(x, THREAD);
  if (row % length > 0) {
    const auto share = load_vector<GROUP>(shares, part);
    const auto before = load_vector<GROUP>(x, THREAD - groups);
    for (int i = 0; i < GROUP; i++) {
      now[i] = static_cast<T>(static_cast<float>(now[i]) + share[i] * static_cast<float>(before[i]));
    }
  }
  store_vector<GROUP>(y, THREAD, now);
"""
# Gradients by x, and by the shares over RUN rows each.
SMEAR_GRADIENTS = """
  const int length = x_shape[1], groups = x_shape[2] / GROUP, rows = x_shape[0] * length;
  const int run = THREAD / groups, part = THREAD % groups, first = RUN * run;
  if (first >= rows) return;
  const auto share = load_vector<GROUP>(shares, part);
  float sums[GROUP] = {};
  auto slope = load_vector<GROUP>(dy, first * groups + part), following = slope;
  auto before = slope;  // of x; used from the second row of a sequence on
  if (first % length > 0) before = load_vector<GROUP>(x, (first - 1) * groups + part);
  for (int row = first; row < min(first + RUN, rows); row++) {
    const int t = row % length;
    if (row + 1 < rows) following = load_vector<GROUP>(dy, (row + 1) * groups + part);
    auto result = slope;
    for (int i = 0; i < GROUP; i++) {
      if (t + 1 < length) {
        result[i] = static_cast<T>(static_cast<float>(slope[i]) + share[i] * static_cast<float>(following[i]));
      }
      if (t > 0) sums[i] += static_cast<float>(slope[i]) * static_cast<float>(before[i]);
    }
    store_vector<GROUP>(dx, row * groups + part, result);
    before = load_vector<GROUP>(x, row * groups + part);
    slope = following;
  }
  for (int i = 0; i < GROUP; i++) dshares[GROUP * THREAD + i] = sums[i];
"""
# Heads x (B, T, H, D): rotated by position, and normed. Channel i turns with channel i + D / 2.
ROTARY_NORM = """
  const int threads = D / GROUP, row = THREAD / threads, lane = THREAD % threads;
  const int length = x_shape[1], heads = x_shape[2];
  const bool second = lane >= threads / 2, inside = row < x_shape[0] * length * heads;
  auto values = load_vector<GROUP>(x, inside ? THREAD : 0);
  float squares = 0;
  for (int i = 0; i < GROUP; i++) squares += static_cast<float>(values[i]) * static_cast<float>(values[i]);
  const float scale = rsqrt(sum_of_head(squares, threads) / D + EPSILON);
  const int angle = row / heads % length * (threads / 2) + lane % (threads / 2);
  const auto cosine = load_vector<GROUP>(cosines, angle);
  const auto sine = load_vector<GROUP>(sines, angle);
  for (int i = 0; i < GROUP; i++) {
    const float value = static_cast<float>(values[i]), other = __shfl_xor_sync(~0u, value, threads / 2);
    const float turned = value * cosine[i] + (second ? other : -other) * sine[i];
    values[i] = static_cast<T>(scale * turned);
  }
  if (inside) store_vector<GROUP>(y, THREAD, values);
"""
ROTARY_NORM_GRADIENT = """
  const int threads = D / GROUP, row = THREAD / threads, lane = THREAD % threads;
  const int length = x_shape[1], heads = x_shape[2];
  const bool second = lane >= threads / 2, inside = row < x_shape[0] * length * heads;
  const auto values = load_vector<GROUP>(x, inside ? THREAD : 0);
  auto slopes = load_vector<GROUP>(dy, inside ? THREAD : 0);
  const int angle = row / heads % length * (threads / 2) + lane % (threads / 2);
  const auto cosine = load_vector<GROUP>(cosines, angle);
  const auto sine = load_vector<GROUP>(sines, angle);
  float turned[GROUP], squares = 0, product = 0;
  for (int i = 0; i < GROUP; i++) {
    const float value = static_cast<float>(values[i]), slope = static_cast<float>(slopes[i]);
    const float other = __shfl_xor_sync(~0u, slope, threads / 2);
    turned[i] = slope * cosine[i] + (second ? -other : other) * sine[i];
    squares += value * value;
    product += value * turned[i];
  }
  const float scale = rsqrt(sum_of_head(squares, threads) / D + EPSILON);
  const float pull = sum_of_head(product, threads) * scale * scale / D;
  for (int i = 0; i < GROUP; i++) {
    slopes[i] = static_cast<T>(scale * (turned[i] - static_cast<float>(values[i]) * pull));
  }
  if (inside) store_vector<GROUP>(dx, THREAD, slopes);
"""
# Heads y (B, T, H, D) less their part along the normed v of the same head and position.
WITHOUT_OWN = """
  const int threads = D / GROUP, row = THREAD / threads;
  const bool inside = row < y_shape[0] * y_shape[1] * y_shape[2];
  auto values = load_vector<GROUP>(y, inside ? THREAD : 0);
  const auto own = load_vector<GROUP>(v, inside ? THREAD : 0);
  float squares = 0, product = 0;
  for (int i = 0; i < GROUP; i++) {
    squares += static_cast<float>(own[i]) * static_cast<float>(own[i]);
    product += static_cast<float>(values[i]) * static_cast<float>(own[i]);
  }
  const float scale = rsqrt(sum_of_head(squares, threads) / D + EPSILON);
  const float part = sum_of_head(product, threads) * scale * scale / D;
  for (int i = 0; i < GROUP; i++) {
    values[i] = static_cast<T>(static_cast<float>(values[i]) - part * static_cast<float>(own[i]));
  }
  if (inside) store_vector<GROUP>(z, THREAD, values);
"""
WITHOUT_OWN_GRADIENTS = """
  const int threads = D / GROUP, row = THREAD / threads;
  const bool inside = row < y_shape[0] * y_shape[1] * y_shape[2];
  const auto values = load_vector<GROUP>(y, inside ? THREAD : 0);
  const auto own = load_vector<GROUP>(v, inside ? THREAD : 0);
  auto slopes = load_vector<GROUP>(dz, inside ? THREAD : 0), other = slopes;
  float squares = 0, product = 0, along = 0;
  for (int i = 0; i < GROUP; i++) {
    squares += static_cast<float>(own[i]) * static_cast<float>(own[i]);
    product += static_cast<float>(values[i]) * static_cast<float>(own[i]);
    along += static_cast<float>(slopes[i]) * static_cast<float>(own[i]);
  }
  const float scale = rsqrt(sum_of_head(squares, threads) / D + EPSILON);
  const float part = sum_of_head(product, threads) * scale / D, pull = sum_of_head(along, threads) * scale / D;
  for (int i = 0; i < GROUP; i++) {
    const float value = static_cast<float>(values[i]), slope = static_cast<float>(slopes[i]);
    const float unit = scale * static_cast<float>(own[i]);
    slopes[i] = static_cast<T>(slope - pull * unit);
    other[i] = static_cast<T>(scale * (2 * part * pull * unit - part * slope - pull * value));
  }
  if (inside) store_vector<GROUP>(dy, THREAD, slopes);
  if (inside) store_vector<GROUP>(dv, THREAD, other);
"""
# name -> (inputs, outputs, source)
KERNELS = {
    "smear": (("x", "shares"), ("y",), SMEAR),
    "smear_gradients": (("x", "shares", "dy"), ("dx", "dshares"), SMEAR_GRADIENTS),
    "rotary_norm": (("x", "cosines", "sines"), ("y",), ROTARY_NORM),
    "rotary_norm_gradient": (("x", "cosines", "sines", "dy"), ("dx",), ROTARY_NORM_GRADIENT),
    "without_own": (("y", "v"), ("z",), WITHOUT_OWN),
    "without_own_gradients": (("y", "v", "dz"), ("dy", "dv"), WITHOUT_OWN_GRADIENTS),
}


@cache
def _kernel(name: str) -> Callable:
    inputs, outputs, source = KERNELS[name]
    return mx.fast.cuda_kernel(name=name, input_names=inputs, output_names=outputs, source=source, header=HEADER)


def run(name: str, inputs: list[mx.array], threads: int, outputs: list[tuple[tuple, mx.Dtype]]) -> list[mx.array]:
    """Run a kernel on a grid of `threads`; `outputs`: (shape, dtype) of each."""
    shapes, dtypes = zip(*outputs, strict=True)
    template = [("T", inputs[0].dtype), ("D", inputs[0].shape[-1]), ("RUN", RUN)]
    blocks = -(-threads // BLOCK) * BLOCK
    launch = {"template": template, "grid": (blocks, 1, 1), "threadgroup": (BLOCK, 1, 1)}
    return _kernel(name)(inputs=inputs, output_shapes=list(shapes), output_dtypes=list(dtypes), **launch)


def takes_heads(*arrays: mx.array) -> bool:
    """Whether the kernels for heads can compute with these: alike, four axes, 2 to 32 threads of a warp for a head."""
    kinds = {(t.shape, t.dtype) for t in arrays}
    return len(kinds) == 1 and arrays[0].ndim == 4 and arrays[0].shape[-1] in (16, 32, 64, 128, 256)


def takes_rows(x: mx.array, shares: mx.array) -> bool:
    """Whether `smear` can compute with these."""
    return x.ndim == 3 and x.shape[-1] % GROUP == 0 and shares.shape == x.shape[-1:] and shares.dtype == mx.float32


@mx.custom_function
def smear(x: mx.array, shares: mx.array) -> mx.array:
    """x (B, T, C) plus a share of the previous token's x, one share (C,) a channel."""
    return run("smear", [x, shares], x.size // GROUP, [(x.shape, x.dtype)])[0]


@smear.vjp
def _smear(primals: tuple, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    x, shares = primals
    runs = -(-x.shape[0] * x.shape[1] // RUN)
    outputs = [(x.shape, x.dtype), ((runs, x.shape[2]), mx.float32)]
    dx, dshares = run("smear_gradients", [x, shares, cotangent], runs * x.shape[2] // GROUP, outputs)
    return dx, dshares.sum(axis=0)


@cache
def _angles(length: int, channels: int, base: float) -> tuple[mx.array, mx.array]:
    """Cosines and sines (T, D / 2) of each position's rotation."""
    turns = np.arange(length)[:, None] * base ** -(np.arange(0, channels, 2) / channels)
    return mx.array(np.cos(turns), mx.float32), mx.array(np.sin(turns), mx.float32)


@cache
def _rotary_norm(base: float) -> Callable:
    @mx.custom_function
    def function(x: mx.array) -> mx.array:
        inputs = [x, *_angles(x.shape[1], x.shape[3], base)]
        return run("rotary_norm", inputs, x.size // GROUP, [(x.shape, x.dtype)])[0]

    @function.vjp
    def gradient(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        inputs = [x, *_angles(x.shape[1], x.shape[3], base), cotangent]
        return run("rotary_norm_gradient", inputs, x.size // GROUP, [(x.shape, x.dtype)])[0]

    return function


def rotary_norm(x: mx.array, base: float) -> mx.array:
    """Heads (B, T, H, D) rotated by their position, then normed."""
    return _rotary_norm(base)(x)


@mx.custom_function
def without_own(y: mx.array, v: mx.array) -> mx.array:
    """Heads y (B, T, H, D) less their part along v, each position's own value."""
    return run("without_own", [y, v], y.size // GROUP, [(y.shape, y.dtype)])[0]


@without_own.vjp
def _without_own(primals: tuple, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    outputs = [(t.shape, t.dtype) for t in primals]
    return tuple(run("without_own_gradients", [*primals, cotangent], primals[0].size // GROUP, outputs))
