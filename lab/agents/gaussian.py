"""A Gaussian process over the constants: what a change is likely to do, from all results so far.

Points lie on the natural scales of lab.loop.space. The kernel is Matern's with smoothness 5/2. Its lengths, one for
each coordinate, and the noise that is not known maximise the posterior: constants that hardly matter get long ones.
Written in numpy because what exists is large: Optuna's process needs PyTorch, scikit-learn's needs scikit-learn and
SciPy.
"""

import math

import numpy as np

LENGTH, LENGTH_SD = 4.0, 1.4  # prior of a length: steps, and the sd of its logarithm
NOISES = (1e-4, 1e-2, 1e-1)  # share of the variance of the results that points do not explain
ASCENTS = 6  # steps of the lengths, each a factor of up to exp(0.5)


class Gaussian:
    def __init__(self, points: np.ndarray, values: np.ndarray, variance: np.ndarray):
        """`points` (N, D), `values` (N,), and the known `variance` (N,) of each value."""
        self.points, self.center, self.scale = points, float(np.median(values)), float(values.std()) or 1.0
        self.values, self.variance = (values - self.center) / self.scale, variance / self.scale**2
        lengths = np.full(points.shape[1], LENGTH)
        self.noise = max(NOISES, key=lambda noise: self._fit(lengths, noise))
        self._ascend(lengths)

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) at each of `points` (M, D)."""
        kernel = _matern(_squares(points / self.lengths, self.points / self.lengths))
        variance = np.maximum(1 - ((kernel @ self.whitener.T) ** 2).sum(1), 1e-12)
        return self.center + self.scale * (kernel @ self.weights), self.scale * np.sqrt(variance)

    def _ascend(self, lengths: np.ndarray) -> None:
        """Resilient propagation: each length follows the sign of its gradient, with half the step after it turned."""
        best, reached = lengths, self._fit(lengths)
        step, before = np.full(len(lengths), 0.5), np.zeros(len(lengths))
        for _ in range(ASCENTS):
            slope = np.sign(self._gradient())
            step[slope * before < 0] /= 2
            lengths, before = np.clip(lengths * np.exp(step * slope), 0.5, 50), slope
            if (now := self._fit(lengths)) > reached:
                best, reached = lengths, now
        self._fit(best)

    def _fit(self, lengths: np.ndarray, noise: float = 0.0) -> float:
        """Condition on the values; returns the log posterior of the lengths."""
        self.lengths, self.squares = lengths, _squares(self.points / lengths, self.points / lengths)
        kernel = _matern(self.squares)
        kernel[np.diag_indices(len(kernel))] += self.variance + (noise or self.noise)
        root = np.linalg.cholesky(kernel)
        self.whitener = np.linalg.inv(root)
        white = self.whitener @ self.values
        self.weights = self.whitener.T @ white
        prior = (np.log(lengths / LENGTH) ** 2).sum() / (2 * LENGTH_SD**2)
        return float(-(white @ white) / 2 - np.log(np.diag(root)).sum() - prior)

    def _gradient(self) -> np.ndarray:
        """Of the log posterior on the logarithms of the lengths."""
        outer = np.outer(self.weights, self.weights) - self.whitener.T @ self.whitener
        distance = np.sqrt(5 * self.squares)
        outer *= 5 / 3 * (1 + distance) * np.exp(-distance)
        scaled = self.points / self.lengths
        likelihood = (outer.sum(1)[:, None] * scaled**2).sum(0) - ((outer @ scaled) * scaled).sum(0)
        return likelihood - np.log(self.lengths / LENGTH) / LENGTH_SD**2


def expected_gain(mean: np.ndarray, sd: np.ndarray, best: float) -> np.ndarray:
    """By how much a normal value is below `best`, on average (expected improvement)."""
    z = (best - mean) / sd
    below = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z])
    return sd * (z * below + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))


def _squares(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Squared distances of all pairs."""
    return np.maximum((one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T, 0)


def _matern(squares: np.ndarray) -> np.ndarray:
    distance = np.sqrt(5 * squares)
    return (1 + distance + distance**2 / 3) * np.exp(-distance)
