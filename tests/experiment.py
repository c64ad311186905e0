"""A small train.py with the real one's contract, and nights in which its experiments are judged without training."""

from lab.agents.briefing import Briefing, Tried
from lab.loop.proposal import Proposal
from lab.loop.source import constants, fingerprint

SETTINGS = {
    "depth": 4, "width": 256, "head_dim": 64, "window": "L", "softcap": 15.0, "dtype": "float32",
    "tokens_per_step": 2048, "rows": 8, "matrix_lr": 0.02, "embedding_lr": 0.3, "unembedding_lr": 0.004,
    "scalar_lr": 0.25, "weight_decay": 0.1, "warmup": 0.0, "warmdown": 0.5, "final_lr": 0.05,
    "sequence_length": 256,
}  # fmt: skip

SOURCE = '''"""A language model that learns in five minutes."""

import math

from prepare import SETTINGS, mx, nn, run

DEPTH = SETTINGS.depth  # layers
WIDTH = SETTINGS.width  # residual stream, channels
HEAD_DIM = SETTINGS.head_dim  # channels per attention head
WINDOW = SETTINGS.window  # attention per layer: L full, S half
DTYPE = SETTINGS.dtype  # of activations
TOKENS_PER_STEP = SETTINGS.tokens_per_step  # tokens per optimizer step
ROWS = SETTINGS.rows  # sequences per pass
MATRIX_LR = SETTINGS.matrix_lr  # Muon, matrices ± of the blocks
EMBEDDING_LR = 0.3  # AdamW, embeddings
SCALAR_LR = SETTINGS.scalar_lr  # AdamW, per-layer scalars
BETAS = (0.8, 0.95)  # AdamW
MOMENTUM = 0.95  # Muon
WEIGHT_DECAY = SETTINGS.weight_decay  # Muon
WARMUP = SETTINGS.warmup  # share of the budget
WARMDOWN = SETTINGS.warmdown  # share of the budget
FINAL_LR = SETTINGS.final_lr  # share of the full rate
TIED = False  # head shares the embedding
NAMES = [DEPTH, WIDTH]


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def __call__(self, x):
        return self.down(nn.relu(self.up(x)) ** 2)  # squared: "relu²"


def schedule(progress: float) -> float:
    """Share of the full rate at this share of the budget."""
    if progress < 1 - WARMDOWN:
        return 1.0
    return FINAL_LR + (1 - FINAL_LR) * (1 - progress) / WARMDOWN


def build_model(vocab_size: int):
    return nn.Sequential(nn.Embedding(vocab_size, WIDTH), *[MLP(WIDTH) for _ in range(DEPTH)])


def main() -> None:
    rate = MATRIX_LR * math.sqrt(WIDTH / 256) * schedule(0.0)
    run(build_model, rate, ROWS, TOKENS_PER_STEP)


if __name__ == "__main__":
    main()
'''

PROGRAM = "Lower val_bpb. Never stop. " * 40


def briefing(number: int = 1, **fields) -> Briefing:
    return Briefing(number, **{"source": SOURCE, "settings": SETTINGS, "program": PROGRAM, **fields})


def outcome(number: int, proposal: Proposal, delta: float | None = 0.01, verdict: str = "discard") -> Tried:
    return Tried(number, proposal.hypothesis, verdict, delta, proposal.edit)


def night(agent, count: int, judge) -> list[Proposal]:
    """`count` experiments of an agent; `judge(constants) -> (delta, verdict)`. Kept sources become the incumbent."""
    source, history, tried, proposals = SOURCE, [], set(), []
    for number in range(1, count + 1):
        brief = briefing(number, source=source, history=tuple(history), tried=frozenset(tried))
        proposal = agent.propose(brief)
        mark = fingerprint(proposal.source, SETTINGS)
        assert mark not in tried
        tried.add(mark)
        values = {name: item.value for name, item in constants(proposal.source, SETTINGS).items()}
        delta, verdict = judge(values)
        history.append(outcome(number, proposal, delta, verdict))
        source = proposal.source if verdict == "keep" else source
        agent.tell(proposal, history[-1])
        proposals.append(proposal)
    return proposals


def long_history(count: int) -> tuple[Tried, ...]:
    edit = {"form": "set", "values": {"DEPTH": 5}, "was": {"DEPTH": 4}}
    return tuple(Tried(n, "deeper " * 20, "discard", 0.001, edit) for n in range(1, count + 1))
