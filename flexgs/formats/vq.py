"""Vector-quantised files: Compressed 3DGS (Niedermayr et al., CVPR 2024, arXiv 2401.02436).

Colours (all spherical harmonics) and shapes (covariances divided by their trace) are replaced by entries of
two codebooks, found by k-means in which a Gaussian weighs as much as the images are sensitive to it. The most
sensitive Gaussians keep entries of their own. Positions are float16; opacities, sizes and codebooks have 8
bits between the minimum and the maximum of their column; Gaussians are in Morton order, packed with DEFLATE.
A shape is clustered as a covariance and stored as a rotation and scales.

Different from the paper: opacities are quantised as logits and sizes as logarithms; a fixed fraction of the
Gaussians has entries of its own, not all above a fixed sensitivity, whose number would depend on the scene.
Left out: the fine-tuning under quantisation, and the sensitivity to the shape, in place of which that to the
colour is used.
"""

from pathlib import Path

import numpy as np

from flexgs.errors import UserError
from flexgs.formats.arrays import read_arrays, write_arrays
from flexgs.gaussians import Gaussians, rotation_matrices
from flexgs.inputs import Layout
from flexgs.ply import checked

CODEBOOK = 4096
"""Number of clusters of a codebook, as in the paper."""
OWN_COLOURS, OWN_SHAPES = 0.1, 0.3
"""Fractions of the Gaussians with entries of their own: 48 bytes for a colour of degree 3, 7 for a shape.

Two models of fox (24,000 Gaussians) lose 0.19 and 0.52 dB with these entries; without them they lose 0.79 and
1.52 dB, in three quarters of the bytes.
"""
KIND = "vq 1"
LAYOUT: Layout = {
    "means": ("float16", (3, "n")),
    # logit of the opacity, logarithm of the size
    "scalars": ("uint8", (2, "n")), "scalars_range": ("float32", (2, 2)),
    "colour": ("uint16", ("n",)), "colours": ("uint8", ("c", "colours")),
    "colours_range": ("float32", ("c", 2)),
    "shape": ("uint16", ("n",)), "shapes": ("uint8", (7, "shapes")), "shapes_range": ("float32", (7, 2)),
}
_UPPER = np.triu_indices(3)  # the six numbers of a symmetric matrix


def write(gaussians: Gaussians, path: Path | str, sensitivity: np.ndarray, codebook: int = CODEBOOK) -> None:
    """Write Gaussians, given the sensitivity [N] >= 0 of the images to each; positions become float16."""
    order = morton_order(gaussians.means)
    g, weight = gaussians[order], sensitivity[order].astype(np.float64)
    variances = np.exp(2 * g.scales.astype(np.float64).clip(max=300))
    size = np.sqrt(variances.sum(1))
    axes = rotation_matrices(g.quats.astype(np.float64)) * (np.sqrt(variances) / size[:, None])[:, None, :]
    covariances = (axes @ axes.transpose(0, 2, 1))[:, *_UPPER]
    colour, colours = clustered(np.concatenate([g.sh0, g.shN.reshape(len(g), -1)], axis=1), weight, codebook,
                                OWN_COLOURS)
    shape, shapes = clustered(covariances, weight, codebook, OWN_SHAPES)
    arrays = {"means": g.means.T.clip(-65504, 65504).astype(np.float16), "colour": colour,
              "shape": shape}
    scalars = np.stack([g.opacities, np.log(size)], axis=1)
    for name, values in (("scalars", scalars), ("colours", colours),
                         ("shapes", _rotations_and_scales(shapes))):
        arrays[name], arrays[f"{name}_range"] = to_bytes(values)
    write_arrays(path, KIND, arrays)


@np.errstate(over="ignore", invalid="ignore")  # checked() refuses what is not finite
def read(path: Path | str) -> Gaussians:
    """Read the Gaussians of a file that write() made, in Morton order."""
    arrays = read_arrays(path, KIND, LAYOUT)
    if len(arrays["colours"]) not in (3, 12, 27, 48):
        raise UserError(f"{path}: found {len(arrays['colours'])} values per colour, expected 3, 12, 27 "
                        "or 48; write it again")
    scalars, colours, shapes = (from_bytes(arrays[name], arrays[f"{name}_range"])
                                for name in ("scalars", "colours", "shapes"))
    for index, entries in (("colour", colours), ("shape", shapes)):
        if (last := int(arrays[index].max(initial=0))) >= len(entries):
            raise UserError(f"{path}: found {index} {last}, expected below the {len(entries)} of the "
                            "codebook; write it again")
    colour, shape = colours[arrays["colour"].astype(int)], shapes[arrays["shape"].astype(int)]
    return checked(Gaussians(
        means=arrays["means"].T.astype(np.float32), quats=shape[:, :4],
        scales=shape[:, 4:] + scalars[:, 1:], opacities=scalars[:, 0], sh0=colour[:, :3],
        shN=colour[:, 3:].reshape(len(colour), colours.shape[1] // 3 - 1, 3),
    ).map(np.ascontiguousarray), path)


def morton_order(means: np.ndarray) -> np.ndarray:
    """Return indices [N] that sort positions [N, 3] along a Z-curve: neighbours in space are close."""
    cells = means.astype(np.float64) - means.min(0)
    cells = (cells / max(cells.max(), 1e-12) * (2**21 - 1)).astype(np.int64)
    code = np.zeros(len(means), np.int64)
    for bit in range(21):
        for axis in range(3):
            code |= (cells[:, axis] >> bit & 1) << (3 * bit + axis)
    return code.argsort(kind="stable")


def clustered(values: np.ndarray, weight: np.ndarray, codebook: int,
              own: float) -> tuple[np.ndarray, np.ndarray]:
    """Return index uint16 [N] and entries [M, D], so that entries[index[i]] replaces row i of values [N, D].

    The entries are `codebook` means of k-means with weights [N] >= 0, then the rows of largest weight, a
    fraction `own` of all. If the remaining rows fit in the codebook, every row is an entry, in order. The
    result is deterministic on one machine.
    """
    from sklearn.cluster import MiniBatchKMeans  # takes a second to import, and most runs need no k-means

    kept = min(int(own * len(values)), 65536 - codebook)  # an index has 16 bits
    if len(values) - kept <= codebook:
        return np.arange(len(values), dtype=np.uint16), values
    order = np.argsort(-weight, kind="stable")
    first, rest = np.sort(order[:kept]), np.sort(order[kept:])
    weight = weight[rest] / max(weight[rest].mean(), 1e-30) + 1e-3  # unseen Gaussians count a little
    # Small clusters are not reassigned to random rows: they have little weight, not few rows.
    kmeans = MiniBatchKMeans(codebook, init="random", n_init=1, batch_size=8192, reassignment_ratio=0,
                             random_state=0)
    kmeans.fit(values[rest], sample_weight=weight)
    index = np.empty(len(values), np.uint16)
    index[rest], index[first] = kmeans.labels_, codebook + np.arange(kept)
    return index, np.concatenate([kmeans.cluster_centers_, values[first]])


def to_bytes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise each column of values [N, C] to 8 bits: numbers uint8 [C, N], minimum and step [C, 2]."""
    low = values.min(0).astype(np.float32)
    step = ((values.max(0) - low) / 255).astype(np.float32)
    numbers = np.rint((values - low) / np.where(step > 0, step, 1)).clip(0, 255)
    return np.ascontiguousarray(numbers.T.astype(np.uint8)), np.stack([low, step], axis=1)


@np.errstate(over="ignore", invalid="ignore")  # checked() refuses what is not finite
def from_bytes(numbers: np.ndarray, low_and_step: np.ndarray) -> np.ndarray:
    """Return the values [N, C] float32 of what to_bytes returns."""
    low, step = low_and_step.T
    return low + numbers.T * step


def _rotations_and_scales(covariances: np.ndarray) -> np.ndarray:
    """Convert upper triangles [M, 6] of covariances to unit quaternions and logarithms of scales, [M, 7]."""
    from scipy.spatial.transform import Rotation  # takes a fifth of a second to import

    matrices = np.empty((len(covariances), 3, 3))
    matrices[:, *_UPPER] = matrices[:, *_UPPER[::-1]] = covariances
    variances, vectors = np.linalg.eigh(matrices)
    vectors[:, :, 2] *= np.linalg.det(vectors)[:, None]  # right-handed
    quats = Rotation.from_matrix(vectors).as_quat(canonical=True, scalar_first=True)
    # Clipped at a thousandth of the size: flatter shapes look the same and would widen the 8-bit range.
    return np.concatenate([quats, np.log(variances.clip(1e-6)) / 2], axis=1)
