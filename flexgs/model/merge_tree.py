"""The merge tree: pairs of Gaussians become one, pass after pass, down to any count.

A pass has three steps: every Gaussian is compared with its nearest neighbours, the cheapest pairs that have
no Gaussian in common are chosen, and each pair becomes the one Gaussian with its moments. The cost of a pair
is what the merged Gaussian loses of the two: the bound on the divergence by Runnalls (2007, "Kullback-Leibler
approach to Gaussian mixture reduction", IEEE Trans. AES 43, equation 16), plus the variance of the harmonics
within the pair. The weight of a Gaussian is what it adds to images that are known, or else its opacity times
its area: about what it would add if nothing hid it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from numba import njit
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from flexgs.gaussians import Attributes, Gaussians, rotation_matrices, sigmoid
from flexgs.pool import run_ranges

NEIGHBOURS = 8
"""Nearest Gaussians, by their means, that each is compared with."""
COLOUR = 4.0
"""Weight of the variance of the harmonics' coefficients against the divergence, which is in nats."""
PER_PASS = 0.42
"""Largest fraction of the Gaussians that a pass removes before costs are computed anew. It could remove half,
but the last pairs that are left over are poor ones."""
SPREAD = 0.5
"""What becomes of an opacity above 1: the area of the merged Gaussian grows by this power of it. With 0 the
excess is lost; with 1 the sum of opacity times area is kept, although the two hid each other in part."""
FLATTEST = 1e-6
"""Variance of the thinnest axis, against the sum over all axes, that the divergence tells from none."""
WORST = 1e38
"""Cost of a pair whose own cost float32 cannot hold: it is merged last, so that every count is reached."""
FAINTEST = 1e-300
"""The least weight, of Gaussians that add nothing to the images."""
BLOCK = 1 << 20
"""The most Gaussians that are merged at once."""
CHUNK = 1 << 18
"""Gaussians whose neighbours are looked up at once."""

Array = np.ndarray
NONE: Array = np.empty(0)
G = TypeVar("G", bound=Attributes)


class MergeTree(Generic[G]):
    """The same Gaussians at every count, from all down to one.

    Computed on the CPU, in float64 but for the harmonics, and deterministic: a count has one result. Whole
    passes are kept, so that a second cut is cheap. More than BLOCK Gaussians are first merged block by block,
    which bounds the memory.
    """

    def __init__(self, gaussians: G, whole: bool = False, weights: Array | None = None):
        """Take the Gaussians.

        Args:
            gaussians: N Gaussians.
            whole: merge all at once, as the order does, which takes memory for all.
            weights: [N] what each adds to the images, at least 0, in any unit; None: its opacity times its
                area.
        """
        self._given, self._gaussians = gaussians, gaussians.arrays()
        self._weights = NONE if weights is None else np.maximum(weights, FAINTEST)
        self._whole = whole or len(gaussians) <= BLOCK

    @cached_property
    def _passes(self) -> list["Mixture"]:
        return [Mixture.of(self._gaussians, np.arange(len(self._gaussians)), self._weights)]

    def cut(self, count: int) -> G:
        """Return exactly count Gaussians, or the given ones if they are no more."""
        if count >= len(self._gaussians):
            return self._given
        return self._given.like(self._mixture(count).gaussians(self._gaussians))

    def kept(self, count: int) -> Array:
        """[count] int64: which of the given Gaussians each one of cut(count) stands for, the heaviest."""
        return self._mixture(count).kept

    def _mixture(self, count: int) -> "Mixture":
        count = min(max(count, 1), len(self._gaussians))
        passes = self._passes if self._whole else [self._by_blocks(count)]
        while (last := passes[-1]).fewest > count:
            passes.append(last.after_pass(count))
        mixture = next(m for m in reversed(passes) if len(m) >= count)
        while len(mixture) > count:
            mixture = mixture.after_pass(count)
        return mixture

    def order(self) -> Array:
        """[N] int64: all indices of the given Gaussians, the merges in reverse.

        The first k are the heaviest ones of the k clusters that a cut of k Gaussians is made of, if all are
        merged at once.
        """
        while len(last := self._passes[-1]) > 1:
            self._passes.append(last.after_pass(1))
        return np.concatenate([last.kept, *(m.removed[::-1] for m in self._passes[::-1])])

    def _by_blocks(self, count: int) -> "Mixture":
        """Merge each block by itself, to twice the count in all or to BLOCK Gaussians, whichever is more."""
        fraction = min(1, max(2 * count, BLOCK) / len(self._gaussians))
        parts = []
        for rows in _blocks(self._gaussians.means, np.arange(len(self._gaussians))):
            weights = self._weights[rows] if len(self._weights) else NONE
            part, fewer = Mixture.of(self._gaussians[rows], rows, weights), math.ceil(fraction * len(rows))
            while len(part) > fewer:
                part = part.after_pass(fewer)
            parts.append(part)
        return Mixture(**{field.name: np.concatenate([getattr(part, field.name) for part in parts])
                          for field in fields(Mixture)})


@dataclass
class Mixture:
    """N Gaussians between two passes, as moments."""

    means: Array
    """[N, 3] float64."""
    covariances: Array
    """[N, 6] float64: xx xy xz yy yz zz."""
    areas: Array
    """[N] float64, the product of the two larger standard deviations."""
    opacities: Array
    """[N] float64, 0 to 1."""
    harmonics: Array
    """[N, 3 (K + 1)] float32, the constant coefficients first."""
    kept: Array
    """[N] int64: the given Gaussian that each stands in the place of, the heaviest of its cluster."""
    alone: Array
    """[N] bool: whether it is a given Gaussian still."""
    weights: Array
    """[N] float64: what each adds to the images; empty: its area times its opacity."""
    removed: Array
    """int64: the given Gaussians that the last pass has removed from kept, the cheapest first."""

    @staticmethod
    def of(gaussians: Gaussians, kept: Array, weights: Array = NONE) -> "Mixture":
        """The moments of Gaussians, which stand in the places kept."""
        g, n = gaussians, len(gaussians)
        scales = np.exp(g.scales.astype(np.float64).clip(-40, 40))
        axes = rotation_matrices(g.quats.astype(np.float64)) * scales[:, None, :]
        largest = np.sort(scales, axis=1)
        return Mixture(g.means.astype(np.float64), _packed(axes @ axes.transpose(0, 2, 1)),
                       largest[:, 1] * largest[:, 2], sigmoid(g.opacities.astype(np.float64)),
                       np.concatenate([g.sh0[:, None], g.shN], 1).reshape(n, -1),
                       kept, np.ones(n, bool), weights, np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.means)

    @property
    def fewest(self) -> int:
        """How many Gaussians a whole pass leaves at least."""
        return len(self) - max(1, int(PER_PASS * len(self)))

    def after_pass(self, count: int) -> "Mixture":
        """The mixture after one pass, which leaves count Gaussians or, where these are too few, `fewest`."""
        solid = np.maximum(self.areas * self.opacities, FAINTEST)
        weights = self.weights if len(self.weights) else solid
        first, second = self._pairs(weights, len(self) - max(count, self.fewest))
        stays = weights[first] >= weights[second]
        a, b = np.where(stays, first, second), np.where(stays, second, first)
        mass = weights[a] + weights[b]
        solid = solid[a] * (mass / weights[a])  # the lighter one as if it were as hidden as the heavier
        p = (weights[a] / mass)[:, None]
        q, away = 1 - p, self.means[a] - self.means[b]
        means = p * self.means[a] + q * self.means[b]
        covariances = (p * self.covariances[a] + q * self.covariances[b]
                       + p * q * _packed(away[:, :, None] * away[:, None, :]))
        variances = np.linalg.eigvalsh(_unpacked(covariances)).clip(1e-200)
        areas = np.sqrt(variances[:, 1] * variances[:, 2])
        growth = np.maximum(solid / areas, 1) ** SPREAD
        rows, merged = np.ones(len(self), bool), np.zeros(len(self), np.int64)
        rows[b] = False
        merged[a] = np.arange(1, len(a) + 1)
        merged = merged[rows]  # 0, or 1 + the number of the pair
        at, pair = np.flatnonzero(merged), merged[merged > 0] - 1

        def new(old: Array, values: Array) -> Array:
            out = old[rows]
            out[at] = values[pair]
            return out

        harmonics = p.astype(np.float32) * self.harmonics[a] + q.astype(np.float32) * self.harmonics[b]
        return Mixture(new(self.means, means), new(self.covariances, covariances * growth[:, None]),
                       new(self.areas, areas * growth),
                       new(self.opacities, np.minimum(solid / (areas * growth), 1)),
                       new(self.harmonics, harmonics), self.kept[rows],
                       new(self.alone, np.zeros(len(a), bool)),
                       new(self.weights, mass) if len(self.weights) else self.weights, self.kept[b])

    def _pairs(self, weights: Array, most: int) -> tuple[Array, Array]:
        """Two [M] arrays of indices, M <= most: disjoint pairs of neighbours, the cheapest first."""
        n = len(self)
        tree, k = cKDTree(self.means), min(NEIGHBOURS + 1, n)
        neighbours = np.empty((n, k), np.int32)
        for start in range(0, n, CHUNK):
            neighbours[start:start + CHUNK] = tree.query(self.means[start:start + CHUNK], k, workers=-1)[1]
        costs = np.empty((n, k), np.float32)
        run_ranges(_costs, n, neighbours, self.means, self.covariances, self.harmonics, weights,
                   _log_volumes(self.covariances), costs)
        flat = costs.ravel()
        pairs = np.flatnonzero(np.isfinite(flat))
        pairs = pairs[np.argsort(flat[pairs], kind="stable")]
        return _disjoint(pairs, neighbours, most)

    def gaussians(self, given: Gaussians) -> Gaussians:
        """Return the Gaussians; those that were not merged are rows of given, which the mixture is of."""
        new, at = given[self.kept], ~self.alone
        variances, vectors = np.linalg.eigh(_unpacked(self.covariances[at]))
        vectors[np.linalg.det(vectors) < 0, :, 0] *= -1
        opacities = self.opacities[at].clip(1e-4, 1 - 1e-4)
        harmonics = self.harmonics[at].reshape(-1, 1 + given.shN.shape[1], 3)
        new.means[at] = self.means[at]
        new.scales[at] = np.log(variances.clip(1e-30)) / 2
        new.opacities[at] = np.log(opacities) - np.log1p(-opacities)
        new.sh0[at], new.shN[at] = harmonics[:, 0], harmonics[:, 1:]
        if at.any():
            new.quats[at] = Rotation.from_matrix(vectors).as_quat(scalar_first=True)
        return new


def _blocks(means: Array, rows: Array) -> Iterator[Array]:
    """Split the rows of means into blocks of at most BLOCK: in halves, along the longest axis of each."""
    if len(rows) <= BLOCK:
        yield np.sort(rows)
        return
    low, high = means[rows].min(0), means[rows].max(0)
    halves = rows[np.argpartition(means[rows, (high - low).argmax()], len(rows) // 2)]
    yield from _blocks(means, halves[:len(rows) // 2])
    yield from _blocks(means, halves[len(rows) // 2:])


def _packed(matrices: Array) -> Array:
    """[N, 6] of symmetric [N, 3, 3]."""
    return matrices[:, (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]


def _unpacked(packed: Array) -> Array:
    """[N, 3, 3] of [N, 6]."""
    return packed[:, (0, 1, 2, 1, 3, 4, 2, 4, 5)].reshape(-1, 3, 3)


def _log_volumes(covariances: Array) -> Array:
    """[N] logarithms of the determinants, thin ones as thick as FLATTEST."""
    out = np.empty(len(covariances))
    run_ranges(_fill_log_volumes, len(out), covariances, out)
    return out


@njit(inline="always")
def _log_volume(xx, xy, xz, yy, yz, zz):
    thick = FLATTEST * (xx + yy + zz)
    xx, yy, zz = xx + thick, yy + thick, zz + thick
    det = xx * (yy * zz - yz * yz) - xy * (xy * zz - yz * xz) + xz * (xy * yz - yy * xz)
    return np.log(max(det, 1e-300))


@njit(nogil=True, cache=True, error_model="numpy")
def _fill_log_volumes(lo, hi, c, out):
    for i in range(lo, hi):
        out[i] = _log_volume(c[i, 0], c[i, 1], c[i, 2], c[i, 3], c[i, 4], c[i, 5])


@njit(nogil=True, cache=True, error_model="numpy")
def _costs(lo, hi, neighbours, means, c, harmonics, weights, log_volumes, out):
    """Fill rows lo to hi of out [N, k] with the cost of merging each Gaussian with each of its neighbours.

    Infinite for itself, and for a neighbour that comes first and has this pair among its own.
    """
    k = neighbours.shape[1]
    for i in range(lo, hi):
        for place in range(k):
            j = neighbours[i, place]
            out[i, place] = np.inf
            listed = j == i
            if j < i:
                for other in range(k):
                    listed |= neighbours[j, other] == i
            if listed:
                continue
            mass = weights[i] + weights[j]
            p, q = weights[i] / mass, weights[j] / mass
            x, y, z = means[i, 0] - means[j, 0], means[i, 1] - means[j, 1], means[i, 2] - means[j, 2]
            volume = _log_volume(p * c[i, 0] + q * c[j, 0] + p * q * x * x,
                                 p * c[i, 1] + q * c[j, 1] + p * q * x * y,
                                 p * c[i, 2] + q * c[j, 2] + p * q * x * z,
                                 p * c[i, 3] + q * c[j, 3] + p * q * y * y,
                                 p * c[i, 4] + q * c[j, 4] + p * q * y * z,
                                 p * c[i, 5] + q * c[j, 5] + p * q * z * z)
            divergence = (volume - p * log_volumes[i] - q * log_volumes[j]) / 2
            variance = 0.0
            for f in range(harmonics.shape[1]):
                variance += (harmonics[i, f] - harmonics[j, f]) ** 2
            cost = (divergence + COLOUR * p * q * variance) * np.sqrt(mass)
            out[i, place] = cost if cost < WORST else WORST  # also where it is no number


@njit(cache=True)
def _disjoint(pairs, neighbours, most):
    """The first pairs, of places in the flat [N, k] neighbours, that have no Gaussian in common."""
    n, k = neighbours.shape
    taken = np.zeros(n, np.bool_)
    first, second = np.empty(most, np.int64), np.empty(most, np.int64)
    found = 0
    for place in pairs:
        if found == most:
            break
        i = place // k
        j = neighbours[i, place % k]
        if not taken[i] and not taken[j]:
            taken[i] = taken[j] = True
            first[found], second[found] = i, j
            found += 1
    return first[:found], second[:found]
