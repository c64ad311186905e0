"""How large the updates of a training are against the weights, by group of parameters.

At two moments of a run a sample of every parameter is copied after one step and after the next. The copies are put into
the device's queue like the step itself and read when the training is over, so no step waits for them.
"""

import re
from typing import Any

from lab.machine.backend import mx, tree_flatten

MOMENTS = (0.25, 0.75)  # shares of the budget
SAMPLE = 4096  # elements of each parameter: a root mean square within two per cent
GROUPS = 24  # the largest ones are kept


class Updates:
    """Call `look` after every step with the share of the budget that is over, and `ratios` at the end."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.taken: list[dict[str, Any]] = []  # two for each moment
        self.sizes = {name: value.size for name, value in tree_flatten(model.trainable_parameters())}

    def look(self, progress: float) -> None:
        due = sum(progress >= moment for moment in MOMENTS)
        if len(self.taken) < 2 * due or len(self.taken) % 2:
            parameters = tree_flatten(self.model.trainable_parameters())
            self.taken.append({name: _sample(value) for name, value in parameters})
            mx.async_eval(self.taken[-1])

    def ratios(self) -> dict[str, list[float]]:
        """Group -> root mean square of an update over that of the weights, at each moment that was reached."""
        pairs = list(zip(self.taken[::2], self.taken[1::2], strict=False))
        groups: dict[str, list[str]] = {}
        for name in sorted(self.sizes, key=self.sizes.get, reverse=True):
            groups.setdefault(group(name), []).append(name)
        return {each: [self._ratio(*pair, groups[each]) for pair in pairs] for each in list(groups)[:GROUPS]}

    def _ratio(self, before: dict[str, Any], after: dict[str, Any], names: list[str]) -> float:
        squares = [
            (self.sizes[name], mx.mean(mx.square(after[name] - before[name])), mx.mean(mx.square(before[name])))
            for name in names
            if name in before and name in after and before[name].shape == after[name].shape
        ]
        update, weight = (sum(size * each[at].item() for size, *each in squares) for at in (0, 1))
        return float(f"{(update / weight) ** 0.5:.3g}") if weight else 0.0


def group(name: str) -> str:
    """The last two words of a parameter's name without numbers: blocks.0.attention.query.weight is attention.query."""
    words = [re.sub(r"\d+$", "", word) for word in name.split(".")]
    words = [word for word in words if word and word not in ("weight", "bias")]
    return ".".join(words[-2:]) or name


def _sample(value: mx.array) -> mx.array:
    """A copy of evenly spaced elements: a view would keep the whole parameter in memory."""
    return mx.contiguous(value.reshape(-1)[:: -(-value.size // SAMPLE)].astype(mx.float32))
