"""Attributes of Gaussians as integers and back: each value in steps that fit its Gaussian.

A value is stored as round(value / step). The step is that of its attribute in the chunk, times

    2^level                 the level is of the Gaussian, an integer: how little it counts in the pictures;
                            harmonics take 2^(level / 2), and opacities no level
    size                    for means: the geometric mean of the standard deviations, but at least `finest`
    roundness               for quats: the middle by the largest standard deviation, but at least 1/1024

both of the log-scales as they are stored. Before that,

    means                   are taken from the centre of the chunk
    quats                   are turned (turn.py), and w is left out: w = sqrt(1 - x^2 - y^2 - z^2)
    sh0, harmonics          (r, g, b) become (r + g + b) / sqrt 3, (r - b) / sqrt 2, (r - 2 g + b) / sqrt 6
    harmonics               the K coefficients of each of these three, c, become p with c = basis p / 127:
                            basis [K, K], row by row in the file, has the principal directions of the chunk
                            as columns, most of which have small numbers p

Changes that a cut adds (Deltas) are stored in CHANGES times the steps of their attributes, and all four
numbers of quats.
"""

import numpy as np
from numpy.typing import NDArray

from flexgs.deploy.coding import MOST_WIDTH, Integers

Values = NDArray[np.floating]

NAMES = ("scales", "means", "quats", "opacities", "sh0", "shN")
STEPS = {"scales": 0.02, "means": 0.021, "quats": 0.014, "opacities": 0.06, "sh0": 0.019}
"""Steps of a chunk; those of means in sizes. Together they cost the pictures as much as the harmonics do."""
HARMONICS = 1.5
"""Step of the harmonics by their spread to the power of 1.5.

The spread is their root mean square, each harmonic divided by the factor that its Gaussian has on the step.
The exponent is a measured one: pictures of models whose harmonics are large forgive more.
"""
HARMONICS_WITHIN = (1 / 128, 1 / 36)
"""The finest and the coarsest step of the harmonics."""
CHANGES = 1.3
"""Steps of changes over those of what they change: a change is seen in the cuts near its knot alone."""
LEVELS = 4
"""Levels are from -4 to 4."""
SPREAD = 0.75
"""Levels by doublings of the worth; 1 would be best if the errors of Gaussians were independent."""
POWER = {"opacities": 0.0, "shN": 0.5}
"""Power of 2^level in the steps; of all others 1."""
ROUND_UP = {"shN": 0.6}
"""From which part of a step on a value is rounded away from zero; of all others 0.5."""
OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
LEAST_ROUNDNESS = 2.0**-10
SMALLEST = 1e-30
"""The least of a size, in world units."""


def head_type(harmonics: int) -> np.dtype:
    """Return the layout of the parameters of a chunk whose Gaussians have so many harmonics of a colour."""
    return np.dtype([("steps", "<f4", len(NAMES)), ("bounds", "<f4", len(NAMES)), ("centre", "<f4", 3),
                     ("finest", "<f4"), ("basis", "i1", (harmonics, harmonics))])


def levels_of(*worth: Values) -> Integers:
    """Return the levels [N] of Gaussians of some worth (worth.py), whose geometric mean has about level 0.

    Of several, such as in a cut and in the whole model, the largest counts, each by its own geometric mean.
    """
    doublings = np.max([np.log2(values) - np.log2(values).mean() for values in worth], axis=0)
    doublings -= doublings.mean()
    return -np.rint(np.clip(SPREAD * doublings, -LEVELS, LEVELS)).astype(np.int8)


class Quantiser:
    """The steps of a chunk, and what is taken from its values before."""

    def __init__(self, head: np.void):
        self.steps = dict(zip(NAMES, head["steps"].astype(float), strict=True))
        self.centre, self.finest = head["centre"].astype(float), float(head["finest"])
        self.basis = head["basis"] / 127

    @staticmethod
    def head(means: Values, shN: Values, levels: Integers) -> np.void:
        """Choose the parameters for Gaussians of such means [N, 3], harmonics [N, K, 3] and levels [N].

        The bounds are left at 0.
        """
        K, spread = shN.shape[1], 0.0
        head = np.zeros(1, head_type(K))[0]
        head["basis"], head["finest"] = 127 * np.eye(K), SMALLEST
        if len(levels):
            head["centre"] = np.median(means, axis=0)
            head["finest"] = max(SMALLEST, 2.0**-23 * float(np.abs(means).max()) / STEPS["means"])
        if len(levels) and K:
            opponent = np.swapaxes(shN @ OPPONENT.T.astype(np.float32), 1, 2).reshape(-1, K)
            _, vectors = np.linalg.eigh((opponent.T @ opponent).astype(float))
            head["basis"] = np.rint(127 * vectors[:, ::-1])
            shares = np.square(shN).mean(axis=(1, 2)) / 2.0 ** (2 * POWER["shN"] * levels)
            spread = float(np.sqrt(shares.mean()))
        head["steps"] = [*STEPS.values(), np.clip(HARMONICS * spread**1.5, *HARMONICS_WITHIN)]
        return head

    def step(self, name: str, levels: Integers, scales: Values, change: bool) -> Values:
        """Return the steps [N, 1] of an attribute of Gaussians of these levels [N] and log-scales [N, 3].

        Those of changes of it are larger.
        """
        step = (CHANGES if change else 1.0) * self.steps[name] * 2.0 ** (POWER.get(name, 1.0) * levels)
        with np.errstate(over="ignore"):
            if name == "means":
                step = step * np.maximum(np.exp(scales.astype(float).mean(axis=1)), self.finest)
            if name == "quats":
                ordered = np.sort(scales.astype(float), axis=1)
                step = step * np.maximum(np.exp(ordered[:, 1] - ordered[:, 2]), LEAST_ROUNDNESS)
        return step[:, None]

    def columns(self, name: str, values: Values, change: bool) -> Values:
        """Return an attribute [N, ...], or changes of it, as the columns [N, M] that are divided by steps."""
        values = np.asarray(values, float)
        if name == "means" and not change:
            return values - self.centre
        if name == "quats" and not change:
            return values[:, 1:]
        if name == "sh0":
            return values @ OPPONENT.T
        if name == "shN":
            values = np.swapaxes(values @ OPPONENT.T, 1, 2) @ np.linalg.inv(self.basis).T
        return values.reshape(len(values), -1)

    def values(self, name: str, columns: Values, change: bool) -> Values:
        """Undo columns(); vectors [N, M] stay flat for attributes of one number."""
        if name == "means" and not change:
            return columns + self.centre
        if name == "quats" and not change:
            w = np.sqrt(np.maximum(0, 1 - np.square(columns).sum(axis=1, keepdims=True)))
            return np.concatenate([w, columns], axis=1)
        if name == "sh0":
            return columns @ OPPONENT
        if name == "shN":
            parts = columns.reshape(len(columns), 3, len(self.basis)) @ self.basis.T
            return np.swapaxes(parts, 1, 2) @ OPPONENT
        return columns


def rounded(name: str, columns: Values, step: Values) -> Integers:
    """Return columns in steps, rounded; OverflowError if that takes more than four bytes."""
    steps = columns / step
    whole = np.sign(steps) * np.floor(np.abs(steps) + 1 - ROUND_UP.get(name, 0.5))
    if not (np.abs(whole) < 2.0 ** (8 * MOST_WIDTH - 1)).all():
        raise OverflowError
    return whole.astype(np.int64)
