"""Operations of a GPT that are slow in plain MLX, most with their own gradient.

On a GPU they use MLX's fused kernels, on an NVIDIA GPU some of our own too (cuda.py). MLX's CPU backend has none, and
its exp and tanh take 15 to 25 ns per element where numpy's vectorised ones take 2 to 3. So on the CPU the same
mathematics runs in numpy, in blocks that fit the cache, with the rows split over the cores. Numpy needs evaluated
arrays, so on the CPU these cannot be used inside `mx.compile`. Gradients agree with MLX's own to float32 rounding
(tests/training/test_kernels.py).

Sources: blockwise attention with recomputed weights, FlashAttention (2205.14135); cross-entropy that computes its
gradient along with the loss, chunk by chunk, Liger kernels (2410.10989).
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from lab import quota
from lab.machine.backend import GPU, KIND, mx, nn
from lab.training import cuda

BLOCK = 128  # queries per block of attention
CHUNK = 256  # tokens per chunk of cross-entropy on the CPU
SAFE_CAP = 50.0  # logits up to this have a finite exp, and finite sums of it, in float32
CHUNK_LOGITS = 2**27  # logits per chunk on a GPU: 512 MB in float32

CUDA = KIND == "cuda"


@cache
def _threads() -> int:
    """Cores that this process may use."""
    return quota.cores()


@cache
def _pool() -> ThreadPoolExecutor:
    """One thread per core. All call numpy's BLAS, which is therefore limited to the calling thread."""
    from threadpoolctl import ThreadpoolController

    for library in ThreadpoolController().lib_controllers:
        if os.path.dirname(library.filepath).endswith("numpy.libs"):
            library.set_num_threads(1)
    return ThreadPoolExecutor(_threads())


def _each(function: Callable, items: Iterable) -> list:
    """function(item) for every item, on all cores."""
    return list(_pool().map(function, items))


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, window: int | None = None) -> mx.array:
    """Causal softmax(scale q k^T) v: q (B, H, T, D), k and v (B, H or a divisor of it, T, D), result (B, H, T, D). The
    channels of v, and so of the result, may differ in number from those of q and k.

    A position attends to itself and the `window` - 1 positions before it; without a window, to all before it."""
    T = q.shape[2]
    window = min(window or T, T)
    if GPU:
        mask = "causal" if window == T else window_mask(T, window)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    groups = q.shape[1] // k.shape[1]
    k, v = (mx.repeat(t, groups, axis=1) if groups > 1 else t for t in (k, v))
    y, _ = _attention(scale, window)(*(t.astype(mx.float32) for t in (q, k, v)))
    return y.astype(q.dtype)


def window_mask(length: int, window: int) -> mx.array:
    """(T, T) bool: each position attends to itself and the `window` - 1 positions before it."""
    distance = mx.arange(length)[:, None] - mx.arange(length)[None, :]
    return (distance >= 0) & (distance < window)


@cache
def _attention(scale: float, window: int) -> Callable:
    """(B, H, T, D) float32 q, k, v to the output and the (B, H, T, 1) log of the softmax's denominator, in numpy."""

    @mx.custom_function
    def function(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        q, k, v = np.asarray(q), np.asarray(k), np.asarray(v)
        y, log_sum = (np.empty((*q.shape[:3], channels), np.float32) for channels in (v.shape[-1], 1))
        _each(lambda b: _attention_row(q[b], k[b], v[b], y[b], log_sum[b], scale, window), range(len(q)))
        return mx.array(y), mx.array(log_sum)

    @function.vjp
    def backward(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, ...]:
        q, k, v, y, log_sum, dy = (np.asarray(t) for t in (*primals, *outputs, cotangents[0]))
        gradients = [np.zeros(t.shape, np.float32) for t in (q, k, v)]

        def row(b: int) -> None:
            _attention_row_gradients(
                q[b], k[b], v[b], y[b], log_sum[b], dy[b], *(g[b] for g in gradients), scale, window
            )

        _each(row, range(len(q)))
        return tuple(mx.array(g) for g in gradients)

    return function


@cache
def _blocks(T: int, window: int) -> list[tuple[slice, slice, np.ndarray]]:
    """Slices of queries, slices of the keys they attend to, and the (queries, keys) mask to add: 0 or -inf."""
    blocks = []
    for start in range(0, T, BLOCK):
        queries, keys = slice(start, min(start + BLOCK, T)), slice(max(0, start - window + 1), min(start + BLOCK, T))
        distance = np.arange(queries.start, queries.stop)[:, None] - np.arange(keys.start, keys.stop)
        hidden = (distance < 0) | (distance >= window)
        blocks.append((queries, keys, np.where(hidden, np.float32(-np.inf), np.float32(0))))
    return blocks


def _attention_row(q, k, v, y, log_sum, scale, window) -> None:
    """q, k, v (H, T, D) of one row; writes y like v and log_sum (H, T, 1)."""
    q = q * np.float32(scale)
    for queries, keys, mask in _blocks(q.shape[1], window):
        scores = q[:, queries] @ k[:, keys].swapaxes(-1, -2)
        scores += mask
        top = scores.max(-1, keepdims=True)
        scores -= top
        np.exp(scores, out=scores)
        total = scores.sum(-1, keepdims=True)
        np.matmul(scores, v[:, keys], out=y[:, queries])
        y[:, queries] /= total
        log_sum[:, queries] = top + np.log(total)


def _attention_row_gradients(q, k, v, y, log_sum, dy, dq, dk, dv, scale, window) -> None:
    """Recomputes the weights of each block; adds to dq, dk, dv (H, T, D)."""
    q = q * np.float32(scale)
    for queries, keys, mask in _blocks(q.shape[1], window):
        weights = q[:, queries] @ k[:, keys].swapaxes(-1, -2)
        weights += mask
        weights -= log_sum[:, queries]
        np.exp(weights, out=weights)
        dv[:, keys] += weights.swapaxes(-1, -2) @ dy[:, queries]
        slope = dy[:, queries] @ v[:, keys].swapaxes(-1, -2)
        slope -= (dy[:, queries] * y[:, queries]).sum(-1, keepdims=True)
        slope *= weights
        np.matmul(slope, k[:, keys], out=dq[:, queries])
        dk[:, keys] += slope.swapaxes(-1, -2) @ q[:, queries]
    dq *= np.float32(scale)


def rotary_norm(x: mx.array, base: float) -> mx.array:
    """Queries or keys (B, H, T, D) rotated by their position (2104.09864), then normed (2010.04245)."""
    if CUDA and cuda.takes_heads(x):
        return cuda.rotary_norm(x.transpose(0, 2, 1, 3), base).transpose(0, 2, 1, 3)
    x = mx.fast.rope(x, dims=x.shape[-1], traditional=False, base=base, scale=1.0, offset=0)
    return mx.fast.rms_norm(x, None, 1e-6)


def without_own(y: mx.array, v: mx.array) -> mx.array:
    """Attention's result y (B, H, T, D) less its part along v, each position's own value (2603.09078)."""
    if CUDA and cuda.takes_heads(y, v):
        return cuda.without_own(*(t.transpose(0, 2, 1, 3) for t in (y, v))).transpose(0, 2, 1, 3)
    own = mx.fast.rms_norm(v, None, 1e-6)
    return y - mx.mean(y * own, axis=-1, keepdims=True) * own


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@cache
def _lookup(dtype: mx.Dtype) -> Callable:
    @mx.custom_function
    def function(table: mx.array, tokens: mx.array) -> mx.array:
        return table.astype(dtype)[tokens]

    @function.vjp
    def gradient(primals: tuple, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
        table, tokens = primals
        return mx.zeros_like(table).at[tokens].add(cotangent.astype(table.dtype)), mx.zeros_like(tokens)

    return function


def lookup(table: mx.array, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
    """Rows of a float32 table (V, C) by tokens (...): (..., C) in `dtype`. The gradient is added up in float32."""
    return _lookup(dtype)(table, tokens)


def smear(x: mx.array, shares: mx.array) -> mx.array:
    """x (B, T, C) plus a share of the previous token's x, one share (C,) a channel."""
    if CUDA and cuda.takes_rows(x, shares):
        return cuda.smear(x, shares)
    return x + shares.astype(x.dtype) * mx.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))


@mx.custom_function
def relu_squared(x: mx.array) -> mx.array:
    """max(x, 0)^2 (2109.08668). Only x is kept for the gradient."""
    return mx.square(mx.maximum(x, 0))


@relu_squared.vjp
def _relu_squared(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return (x + mx.abs(x)) * cotangent  # 2 max(x, 0), which compiling would keep if it stood in the value too


# ---------------------------------------------------------------------------------------------------------------------
# Logits and their cross-entropy


def softcap(logits: mx.array, cap: float) -> mx.array:
    """cap tanh(logits / cap), float32; 0 means no cap (2408.00118)."""
    logits = logits.astype(mx.float32)
    if not cap:
        return logits
    return cap * (mx.tanh if GPU else _tanh)(logits / cap)


@mx.custom_function
def _tanh(x: mx.array) -> mx.array:
    x = np.asarray(x)
    y = np.empty(x.shape, np.float32)
    shares = [np.array_split(flat.reshape(-1), _threads()) for flat in (x, y)]
    _each(lambda i: np.tanh(shares[0][i], out=shares[1][i]), range(_threads()))
    return mx.array(y)


@_tanh.vjp
def _tanh_gradient(primals, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent * (1 - mx.square(y))


def linear_cross_entropy(x: mx.array, head: mx.array, targets: mx.array, cap: float) -> mx.array:
    """Mean cross-entropy in nats of softcap(x head^T, cap): x (..., C), head (V, C), targets (...) of token ids.

    The logits of all tokens are never in memory at once: each chunk's gradient is computed with its loss."""
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if not GPU:
        loss, *_ = _cross_entropy_cpu(cap)(x.astype(mx.float32), head.astype(mx.float32), targets)
    elif len(x) * len(head) <= CHUNK_LOGITS:
        loss = nn.losses.cross_entropy(softcap(x @ head.astype(x.dtype).T, cap), targets, reduction="mean")
    else:
        loss, *_ = _cross_entropy_chunked(cap, max(1, CHUNK_LOGITS // len(head)))(x, head, targets)
    return loss


def _with_gradients(function: Callable) -> Callable:
    """Make the gradients by x and head that `function` returns with its loss the gradient of that loss."""
    function = mx.custom_function(function)

    @function.vjp
    def backward(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, ...]:
        _, dx, dhead = outputs
        by_x, by_head = (cotangents[0].astype(d.dtype) * d for d in (dx, dhead))
        return by_x, by_head, mx.zeros_like(primals[2])

    return function


@cache
def _cross_entropy_chunked(cap: float, chunk: int) -> Callable:
    """x (N, C), head (V, C), targets (N,) to the mean loss and its gradients, `chunk` tokens at a time."""

    @_with_gradients
    def function(x: mx.array, head: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        weight, loss, dx, dhead = head.astype(x.dtype), 0.0, [], mx.zeros(head.shape)
        for start in range(0, len(x), chunk):
            part, target = x[start : start + chunk], targets[start : start + chunk, None]
            logits = softcap(part @ weight.T, cap)
            log_sum = mx.logsumexp(logits, axis=-1, keepdims=True)
            loss = loss + mx.sum(log_sum - mx.take_along_axis(logits, target, axis=-1))
            slope = mx.exp(logits - log_sum) - (mx.arange(len(head)) == target)
            if cap:
                slope = slope * (1 - mx.square(logits / cap))
            slope = (slope / len(x)).astype(x.dtype)
            dx.append(slope @ weight)
            dhead = dhead + (slope.T @ part).astype(head.dtype)
        return loss / len(x), mx.concatenate(dx), dhead

    return function


@cache
def _cross_entropy_cpu(cap: float) -> Callable:
    """x (N, C), head (V, C), targets (N,) to the mean loss and its gradients, in numpy. The chunks of a thread are
    fixed, so that sums are the same in every run."""

    @_with_gradients
    def function(x: mx.array, head: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        x, head, targets = np.asarray(x), np.asarray(head), np.asarray(targets)
        dx = np.empty(x.shape, np.float32)
        starts = range(0, len(x), CHUNK)

        def share(worker: int) -> tuple[float, np.ndarray]:
            loss, dhead = 0.0, np.zeros(head.shape, np.float32)
            for start in starts[worker :: _threads()]:
                chunk = slice(start, start + CHUNK)
                loss += _cross_entropy_chunk(x[chunk], head, targets[chunk], cap, 1 / len(x), dx[chunk], dhead)
            return loss, dhead

        losses, dheads = zip(*_each(share, range(_threads())), strict=True)
        return mx.array(sum(losses), mx.float32), mx.array(dx), mx.array(sum(dheads))

    return function


def _cross_entropy_chunk(x, head, targets, cap, weight, dx, dhead) -> float:
    """Sum of the losses of x (n, C), each times `weight`; writes dx (n, C), adds to dhead (V, C)."""
    logits, each = (x / (cap or 1)) @ head.T, np.arange(len(x))
    if cap:
        np.tanh(logits, out=logits)
        cap_slope = np.square(logits)
        np.subtract(1, cap_slope, out=cap_slope)
        logits *= cap
    if not 0 < cap <= SAFE_CAP:
        logits -= logits.max(-1, keepdims=True)
    target_logits = logits[each, targets]
    slope = np.exp(logits, out=logits)
    total = slope.sum(-1, keepdims=True)
    slope[each, targets] -= total[:, 0]
    if cap:
        slope *= cap_slope
    share = weight / total
    np.matmul(slope, head, out=dx)
    dx *= share
    dhead += slope.T @ (x * share)
    return weight * float(np.log(total).sum() - target_logits.sum())
