"""The model of train.py in plain PyTorch, to compare speed only: the same layers, sizes and optimizers, in ordinary
PyTorch (its Muon multiplies long matrices in full). On an NVIDIA GPU the model and Muon's iteration are compiled, the
iteration is in bfloat16 and attention is PyTorch's flash attention, as in karpathy/autoresearch; every layer sees the
full context. Needs torch, which the project does not install. Run on an H100.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POLAR_EXPRESS_STEPS = 5
CUDA = torch.cuda.is_available()


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def smear(x: Tensor, shares: Tensor) -> Tensor:
    return x + shares * F.pad(x[:, :-1], (0, 0, 1, 0))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, T, D) with (T, D / 2) tables."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    def __init__(self, width: int, head_dim: int, has_value_embedding: bool):
        super().__init__()
        self.heads, self.head_dim = width // head_dim, head_dim
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.head_gate = nn.Linear(32, self.heads, bias=False)
        self.value_gate = nn.Linear(32, self.heads, bias=False) if has_value_embedding else None

    def forward(self, x: Tensor, value_embedding: Tensor | None, shares: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        h = smear(norm(x), shares[0])
        q, k, v = (f(h).view(B, T, self.heads, self.head_dim) for f in (self.query, self.key, self.value))
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.value_gate(h[..., :32]))
            v = v + gate[..., None] * value_embedding.view(B, T, self.heads, self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.head_dim**-0.5)
        own = norm(v)
        y = (y - (y * own).mean(-1, keepdim=True) * own).transpose(1, 2)
        y = y * (2 * torch.sigmoid(self.head_gate(h[..., :32])))[..., None]
        x = x + self.out(y.reshape(B, T, C))
        return x + self.down(F.relu(self.up(smear(norm(x), shares[1]))).square())


class GPT(nn.Module):
    """Tokens and targets (B, T) to the mean cross-entropy in nats."""

    def __init__(self, vocab: int, depth: int, width: int, head_dim: int, length: int, softcap: float):
        super().__init__()
        self.softcap = softcap
        self.embedding = nn.Embedding(vocab, width)
        self.value_embeddings = nn.ModuleDict(
            {str(layer): nn.Embedding(vocab, width) for layer in range(depth) if layer % 2 == (depth - 1) % 2}
        )
        self.blocks = nn.ModuleList(Block(width, head_dim, str(i) in self.value_embeddings) for i in range(depth))
        self.smear = nn.Parameter(torch.zeros(1 + 2 * depth, width))
        self.residual_lambdas, self.embedding_lambdas = (nn.Parameter(torch.full((depth,), v)) for v in (1.0, 0.1))
        self.head = nn.Linear(width, vocab, bias=False)
        angles = torch.outer(torch.arange(length), 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = norm(self.embedding(tokens))
        if CUDA and torch.is_autocast_enabled("cuda"):  # else the whole stream would be float32
            x = x.bfloat16()
        x = x0 = norm(smear(x, self.smear[0]))
        for i, block in enumerate(self.blocks):
            value_embedding = self.value_embeddings[str(i)](tokens) if block.value_gate is not None else None
            x = self.residual_lambdas[i] * x + self.embedding_lambdas[i] * x0
            x = block(x, value_embedding, self.smear[2 * i + 1 : 2 * i + 3], self.cos, self.sin)
        logits = self.head(norm(x)).float()
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class Muon:
    """Momentum, orthogonalized by the Newton-Schulz iteration in stacks of equal shape, with NorMuon's even rows."""

    def __init__(self, parameters: list[Tensor], rate: float):
        self.rate, self.stacks = rate, {}
        for p in parameters:
            self.stacks.setdefault(p.shape, []).append(p)
        like = {"device": parameters[0].device}
        self.first = {s: torch.zeros(len(ps), *s, **like) for s, ps in self.stacks.items()}
        self.second = {s: torch.zeros(len(ps), s[0], 1, **like) for s, ps in self.stacks.items()}
        self.orthogonalize = torch.compile(orthogonalize, dynamic=False) if CUDA else orthogonalize

    @torch.no_grad()
    def step(self) -> None:
        for shape, parameters in self.stacks.items():
            g = torch.stack([p.grad for p in parameters])
            first = self.first[shape].lerp_(g, 0.05)
            u = self.orthogonalize(g.lerp(first, 0.95))
            mean = u.square().mean(-1, keepdim=True)
            scale = self.second[shape].lerp_(mean, 0.05).clamp_min(1e-10).rsqrt()
            before, after = mean.sum((-2, -1), keepdim=True), (mean * scale.square()).sum((-2, -1), keepdim=True)
            u = u * scale * (before / after.clamp_min(1e-10)).sqrt()
            for p, update in zip(parameters, u, strict=True):
                p.sub_(self.rate * (update + 0.1 * p * (update * p > 0)))


def orthogonalize(g: Tensor) -> Tensor:
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    x = x.bfloat16() if CUDA else x
    for _ in range(POLAR_EXPRESS_STEPS):  # the coefficients do not matter for the speed
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * (gram @ gram)) @ x
    return (x.mT if tall else x).float()


def stepper(settings: dict, autocast: bool):
    """A function that runs one training step on random tokens and returns its loss."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32, as MLX's default
    device = "cuda" if CUDA else "cpu"
    model = GPT(*(settings[key] for key in ("vocab", "depth", "width", "head_dim", "sequence_length", "softcap"))).to(
        device
    )
    matrices = [p for block in model.blocks for p in block.parameters()]
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    muon, adam = Muon(matrices, 0.02), torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0, fused=True)
    rows, length = settings["rows"], settings["sequence_length"]
    passes = settings["tokens_per_step"] // (rows * length)
    tokens = torch.randint(settings["vocab"], (passes, rows, length + 1), device=device)
    forward = torch.compile(model, dynamic=False) if CUDA else model

    def step() -> float:
        total = torch.zeros((), device=device)
        for part in tokens:
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = forward(part[:, :-1], part[:, 1:]) / passes
            loss.backward()
            total += loss.detach()
        muon.step()
        adam.step()
        for p in model.parameters():
            p.grad = None
        return total.item()  # waits for the GPU

    return step
