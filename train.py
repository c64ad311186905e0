"""One experiment: a GPT, its optimizer and its training loop. This is the file to edit; everything else is fixed.

    python train.py                   five minutes on what `python prepare.py` prepared last, then val_bpb
    python train.py --minutes 0.2     a smoke run

Techniques, by paper: rotary embeddings (2104.09864), QK norm (2010.04245), relu squared (2109.08668), value residual as
gated value embeddings (2410.17897), smear (nanochat 2026), before every sublayer too (2512.17351), exclusive attention
(2603.09078), gated heads (2505.06708), tanh softcap (2408.00118), sliding windows (2004.05150), Muon (Jordan 2024),
Polar Express (2505.16932), NorMuon (2510.05491), cautious weight decay (2510.12402).
"""

from functools import partial
from itertools import islice

import numpy as np

from lab.machine.backend import GPU, mx, nn, tree_flatten, tree_map, tree_unflatten
from lab.training.kernels import (
    attention,
    linear_cross_entropy,
    lookup,
    relu_squared,
    rotary_norm,
    smear,
    softcap,
    without_own,
)
from lab.training.parallel import average, in_shares
from prepare import SETTINGS, execute

# ---------------------------------------------------------------------------------------------------------------------
# Constants: where experiments begin. SETTINGS.x is the preset's value for this machine; any may become a literal.

SEQUENCE_LENGTH = SETTINGS.sequence_length  # tokens of context, fixed by the task
DEPTH = SETTINGS.depth  # layers
WIDTH = SETTINGS.width  # channels of the residual stream
HEAD_DIM = SETTINGS.head_dim  # channels per attention head
MLP_RATIO = 4  # hidden channels of the MLP, as a multiple of WIDTH
WINDOW = SETTINGS.window  # attention per layer: L full context, S half of it; the last layer is always L
SOFTCAP = SETTINGS.softcap  # bound of the logits, 0 for none
ROPE_BASE = 10_000.0  # slowest rotation, in tokens
QK_SCALE = 1.0  # sharpening of normed queries and keys, each
GATE_CHANNELS = 32  # of the input that decide the gates of heads and values
DTYPE = SETTINGS.dtype  # of activations; parameters are float32

TOKENS_PER_STEP = SETTINGS.tokens_per_step  # tokens per optimizer step
DOUBLING = SETTINGS.doubling  # share of the budget after which a step takes twice the tokens; 1 for never
ROWS = SETTINGS.rows  # sequences per forward and backward pass
MATRIX_LR = SETTINGS.matrix_lr  # Muon
EMBEDDING_LR = SETTINGS.embedding_lr  # AdamW, token and value embeddings
UNEMBEDDING_LR = SETTINGS.unembedding_lr  # AdamW, output head
SCALAR_LR = SETTINGS.scalar_lr  # AdamW, per-layer scalars
SMEAR_LR = 0.05  # AdamW, shares of the previous token
WEIGHT_DECAY = SETTINGS.weight_decay  # of the matrices, at the start; falls to 0
ADAM_BETAS = (0.8, 0.95)  # decay of the first moment in a step, of the second in 2^14 tokens (2507.07101)
MUON_MOMENTUM = 0.88  # decay of Muon's gradients, a step
NORMUON_BETA = 0.95  # decay of the second moment of Muon's rows
WARMUP = SETTINGS.warmup  # share of the budget over which rates rise
WARMDOWN = SETTINGS.warmdown  # share of the budget over which rates fall
FINAL_LR = SETTINGS.final_lr  # rate at the end, as a share of the full rate

# ---------------------------------------------------------------------------------------------------------------------
# Model


def norm(x: mx.array) -> mx.array:
    """RMS norm over the last axis, no parameters."""
    return mx.fast.rms_norm(x, None, 1e-6)


class Linear(nn.Module):
    """y = x W^T without bias; the float32 weight takes the dtype of x."""

    def __init__(self, inputs: int, outputs: int, bound: float):
        super().__init__()
        self.weight = mx.random.uniform(-bound, bound, (outputs, inputs))

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.astype(x.dtype).T


class Gate(nn.Module):
    """(B, T, C) to each head's factor (B, T, heads, 1) from 0 to 2, at first 1."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = mx.zeros((heads, min(GATE_CHANNELS, WIDTH)))

    def __call__(self, x: mx.array) -> mx.array:
        return 2 * mx.sigmoid(x[..., :GATE_CHANNELS] @ self.weight.astype(x.dtype).T)[..., None]


class Attention(nn.Module):
    """Causal attention with gated heads; values may get a gated embedding."""

    def __init__(self, layer: int):
        super().__init__()
        bound = (3 / WIDTH) ** 0.5  # uniform with standard deviation 1 / sqrt(WIDTH)
        self.heads = WIDTH // HEAD_DIM
        self.query = Linear(WIDTH, WIDTH, bound)
        self.key = Linear(WIDTH, WIDTH, bound)
        self.value = Linear(WIDTH, WIDTH, bound)
        self.out = Linear(WIDTH, WIDTH, 0.0)  # blocks start as the identity
        self.short = WINDOW[layer % len(WINDOW)] == "S" and layer < DEPTH - 1
        self.head_gate = Gate(self.heads)
        if has_value_embedding(layer):
            self.value_gate = Gate(self.heads)

    def __call__(self, x: mx.array, value_embedding: mx.array | None) -> mx.array:
        B, T, _ = x.shape
        split = (B, T, self.heads, HEAD_DIM)
        q, k, v = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        if value_embedding is not None:
            v = v + self.value_gate(x) * value_embedding.reshape(split)
        q, k, v = (t.transpose(0, 2, 1, 3) for t in (q, k, v))  # (B, heads, T, HEAD_DIM)
        q, k = rotary_norm(q, ROPE_BASE), rotary_norm(k, ROPE_BASE)
        window = max(1, T // 2) if self.short else None
        y = attention(q, k, v, scale=QK_SCALE**2 / HEAD_DIM**0.5, window=window)
        y = without_own(y, v)
        y = y.transpose(0, 2, 1, 3) * self.head_gate(x)
        return self.out(y.reshape(B, T, WIDTH))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Linear(WIDTH, MLP_RATIO * WIDTH, (3 / WIDTH) ** 0.5)
        self.down = Linear(MLP_RATIO * WIDTH, WIDTH, 0.0)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(relu_squared(self.up(x)))


class Block(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.attention = Attention(layer)
        self.mlp = MLP()

    def __call__(self, x: mx.array, value_embedding: mx.array | None, shares: mx.array) -> mx.array:
        x = x + self.attention(smear(norm(x), shares[0]), value_embedding)
        return x + self.mlp(smear(norm(x), shares[1]))


def has_value_embedding(layer: int) -> bool:
    """Every second layer, the last one included."""
    return layer % 2 == (DEPTH - 1) % 2


class GPT(nn.Module):
    """Tokens (B, T) int32 to logits (B, T, V) float32."""

    def __init__(self, vocab_size: int):
        super().__init__()
        bound = (3 / WIDTH) ** 0.5
        self.embedding = mx.random.normal((vocab_size, WIDTH))
        self.value_embeddings = {
            f"layer{layer}": mx.random.uniform(-bound, bound, (vocab_size, WIDTH))
            for layer in range(DEPTH)
            if has_value_embedding(layer)
        }
        self.smear = mx.zeros((1 + 2 * DEPTH, WIDTH))  # shares of the previous token: its embedding, then per sublayer
        self.blocks = [Block(layer) for layer in range(DEPTH)]
        self.residual_lambdas = mx.ones((DEPTH,))  # of the stream, per layer
        self.embedding_lambdas = mx.full((DEPTH,), 0.1)  # of the first layer's input, per layer
        self.head = 0.001 * mx.random.normal((vocab_size, WIDTH))

    def hidden(self, tokens: mx.array) -> mx.array:
        """(B, T) to (B, T, WIDTH), what the head is applied to."""
        dtype = getattr(mx, DTYPE)
        x = norm(lookup(self.embedding, tokens, dtype))
        x = x0 = norm(smear(x, self.smear[0]))
        residual, first = self.residual_lambdas.astype(dtype), self.embedding_lambdas.astype(dtype)
        for layer, block in enumerate(self.blocks):
            table = self.value_embeddings.get(f"layer{layer}")
            value_embedding = None if table is None else lookup(table, tokens, dtype)
            shares = self.smear[2 * layer + 1 : 2 * layer + 3]
            x = block(residual[layer] * x + first[layer] * x0, value_embedding, shares)
        return norm(x)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.hidden(tokens)
        return softcap(x @ self.head.astype(x.dtype).T, SOFTCAP)


def build_model(vocab_size: int) -> nn.Module:
    """The model that is trained and scored: maps tokens (B, T) int32 to logits (B, T, V) float32, causally."""
    return GPT(vocab_size)


def flops_per_token(model: nn.Module) -> float:
    """Forward and backward: 6 per parameter of a matrix product, 12 per channel and attended position."""
    products = sum(v.size for k, v in tree_flatten(model.parameters()) if k == "head" or k.startswith("blocks"))
    spans = [SEQUENCE_LENGTH // 2 if block.attention.short else SEQUENCE_LENGTH for block in model.blocks]
    return 6 * products + 12 * WIDTH * sum(spans)


def loss_function(model: nn.Module, inputs: mx.array, targets: mx.array) -> mx.array:
    """Mean cross-entropy of model(inputs) in nats per token, float32; the logits are never all in memory."""
    return linear_cross_entropy(model.hidden(inputs), model.head, targets, SOFTCAP)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer

# Coefficients of five steps of Polar Express (2505.16932, for singular values from 1e-3 to 1, with a safety margin).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: mx.array) -> mx.array:
    """(N, R, C) matrices to about the nearest ones whose singular values are all 1.

    A step multiplies by a polynomial of the Gram matrix. For long matrices the small polynomials are multiplied first:
    half the operations at 1:4 (Gram Newton-Schulz, Dao AI Lab 2026). Rounding errors of that form grow from step to
    step: float32 needs no restart; TF32, in which newer GPUs multiply float32, a new Gram matrix after two steps."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.swapaxes(-1, -2) if tall else g
    x = x / (mx.linalg.norm(x, axis=(-2, -1), keepdims=True) * 1.02 + 1e-6)
    if x.shape[-1] < 2 * x.shape[-2]:
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.swapaxes(-1, -2)
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    else:
        eye = mx.eye(x.shape[-2])
        for steps in (POLAR_EXPRESS[:2], POLAR_EXPRESS[2:]) if GPU else (POLAR_EXPRESS,):
            gram, product = x @ x.swapaxes(-1, -2), None
            for a, b, c in steps:
                polynomial = a * eye + b * gram + c * (gram @ gram)
                product = polynomial if product is None else polynomial @ product
                gram = polynomial @ gram @ polynomial
            x = product @ x
    return x.swapaxes(-1, -2) if tall else x


class MuonAdamW:
    """Muon for the matrices of the blocks, stacked by shape; AdamW for the rest. `state` holds every moment."""

    def __init__(self, model: nn.Module):
        parameters = dict(tree_flatten(model.trainable_parameters()))
        scale = (WIDTH / 768) ** -0.5  # rates were found at width 768
        self.adam_rates, self.stacks = {}, {}
        for name, value in parameters.items():
            if name.startswith("blocks"):
                self.stacks.setdefault("x".join(map(str, value.shape)), []).append(name)
            elif name == "head":
                self.adam_rates[name] = UNEMBEDDING_LR * scale
            elif name == "smear":
                self.adam_rates[name] = SMEAR_LR
            elif name.endswith("lambdas"):  # the stream's own scale is more sensitive
                self.adam_rates[name] = SCALAR_LR * (0.01 if name == "residual_lambdas" else 1.0)
            else:
                self.adam_rates[name] = EMBEDDING_LR * scale
        self.state = {"step": mx.array(0.0), "first": {}, "second": {}}
        for name in self.adam_rates:
            self.state["first"][name] = self.state["second"][name] = mx.zeros_like(parameters[name])
        for shape, names in self.stacks.items():
            rows, columns = parameters[names[0]].shape
            self.state["first"][shape] = mx.zeros((len(names), rows, columns))
            reduced = (rows, 1) if rows >= columns else (1, columns)
            self.state["second"][shape] = mx.zeros((len(names), *reduced))

    def update(self, model: nn.Module, gradients: dict, rate: mx.array, decay: mx.array) -> None:
        """One step. `rate` scales every learning rate, `decay` is the weight decay; both are scalar arrays."""
        parameters, gradients = dict(tree_flatten(model.trainable_parameters())), dict(tree_flatten(gradients))
        self.state["step"] = self.state["step"] + 1
        changed = {name: self._adam(name, parameters[name], gradients[name], rate) for name in self.adam_rates}
        ahead = [self._ahead(shape, mx.stack([gradients[n] for n in names])) for shape, names in self.stacks.items()]
        for (shape, names), u in zip(self.stacks.items(), in_shares(orthogonalize, ahead), strict=True):
            stack = self._muon(shape, mx.stack([parameters[n] for n in names]), u, rate, decay)
            changed |= dict(zip(names, stack, strict=True))
        model.update(tree_unflatten(list(changed.items())))

    def _adam(self, name: str, p: mx.array, g: mx.array, rate: mx.array) -> mx.array:
        beta1, beta2 = ADAM_BETAS[0], ADAM_BETAS[1] ** (TOKENS_PER_STEP / 2**14)
        first = self.state["first"][name] = beta1 * self.state["first"][name] + (1 - beta1) * g
        second = self.state["second"][name] = beta2 * self.state["second"][name] + (1 - beta2) * mx.square(g)
        step = self.state["step"]
        size = self.adam_rates[name] * rate * mx.sqrt(1 - beta2**step) / (1 - beta1**step)
        return p - size * first / (mx.sqrt(second) + 1e-10)

    def _ahead(self, shape: str, g: mx.array) -> mx.array:
        """(N, R, C) gradients of one shape to their Nesterov momentum."""
        m = MUON_MOMENTUM
        first = self.state["first"][shape] = m * self.state["first"][shape] + (1 - m) * g
        return m * first + (1 - m) * g

    def _muon(self, shape: str, p: mx.array, u: mx.array, rate: mx.array, decay: mx.array) -> mx.array:
        """(N, R, C) parameters and directions to new parameters."""
        u = self._even_out(shape, u)
        size = MATRIX_LR * rate * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
        return p - size * (u + decay * p * (u * p > 0))  # decay only what the step shrinks too

    def _even_out(self, shape: str, u: mx.array) -> mx.array:
        """NorMuon: rows (of tall matrices; else columns) get steps of even size, the whole keeps its norm."""
        axis = -1 if u.shape[-2] >= u.shape[-1] else -2
        mean = mx.mean(mx.square(u), axis=axis, keepdims=True)
        second = self.state["second"][shape]
        second = self.state["second"][shape] = NORMUON_BETA * second + (1 - NORMUON_BETA) * mean
        scale = mx.rsqrt(mx.maximum(second, 1e-10))
        before, after = (mx.sum(m, axis=(-2, -1), keepdims=True) for m in (mean, mean * mx.square(scale)))
        return u * scale * mx.sqrt(before / mx.maximum(after, 1e-10))  # 0 where the gradient is 0


# ---------------------------------------------------------------------------------------------------------------------
# Training


def schedule(progress: float) -> tuple[float, float]:
    """Rate multiplier and weight decay at this share of the budget."""
    rate = min(1.0, progress / WARMUP if WARMUP else 1.0)
    if WARMDOWN and progress > 1 - WARMDOWN:
        rate = FINAL_LR + (1 - FINAL_LR) * (1 - progress) / WARMDOWN
    return rate, WEIGHT_DECAY * (1 - progress)


def make_step(model: nn.Module, optimizer: MuonAdamW, compiled: bool):
    """The whole step: step(inputs, targets, rate, decay) -> loss; inputs (passes, rows, T) int32; and its state.

    Passes follow each other, to save memory. Compiled are one pass and the update, so that the number of passes changes
    nothing that is compiled."""
    one_pass, update = partial(nn.value_and_grad(model, loss_function), model), partial(optimizer.update, model)
    state = [model.state, optimizer.state]
    if compiled:
        one_pass = mx.compile(one_pass, inputs=model.state, outputs=model.state)
        update = mx.compile(update, inputs=state, outputs=state)

    def step(inputs: mx.array, targets: mx.array, rate: mx.array, decay: mx.array) -> mx.array:
        passes = len(inputs)
        loss, gradients = one_pass(inputs[0], targets[0])
        for i in range(1, passes):
            (mx.async_eval if compiled else mx.eval)(loss, gradients)
            more, extra = one_pass(inputs[i], targets[i])
            loss, gradients = loss + more, tree_map(mx.add, gradients, extra)
        loss, gradients = average(loss / passes, tree_map(lambda g: g / passes, gradients))  # over processes
        update(gradients, rate, decay)
        return loss

    return step, state


def main(run) -> nn.Module:
    """Train for as long as the run's clock allows and return the model."""
    model = build_model(run.vocab_size)
    optimizer = MuonAdamW(model)
    tokens_per_pass = ROWS * SEQUENCE_LENGTH * run.processes
    batches = run.batches(ROWS, TOKENS_PER_STEP)
    # On the CPU compiling gains nothing (1.91 against 1.86 s a step) and costs a minute of g++ for new constants.
    step, state = make_step(model, optimizer, compiled=GPU)
    run.begin(model, flops_per_token=flops_per_token(model), depth=DEPTH, width=WIDTH, tokens_per_step=TOKENS_PER_STEP)

    def next_batch() -> tuple[mx.array, mx.array]:
        tokens = TOKENS_PER_STEP * (2 if run.clock.progress > DOUBLING else 1)
        inputs, targets = zip(*islice(batches, tokens // tokens_per_pass), strict=True)
        return mx.array(np.stack(inputs)), mx.array(np.stack(targets))

    def record(number: int, loss: mx.array, tokens: int, rate: float) -> None:
        run.record(number, loss.item(), tokens, rate=rate)

    batch = next_batch()
    in_flight = None  # the step that the device computes while the next one is prepared
    for number in run.clock:
        tokens = batch[0].size * run.processes
        rate, decay = schedule(run.clock.progress)
        rate *= (tokens / TOKENS_PER_STEP) ** 0.5
        loss = step(*batch, mx.array(rate), mx.array(decay))
        mx.async_eval(loss, state)
        batch = next_batch()
        if in_flight:
            record(*in_flight)
        in_flight = (number, loss, tokens, rate)
    record(*in_flight)
    return model


if __name__ == "__main__":
    execute(main, __file__)
