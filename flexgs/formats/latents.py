"""Files of integer latents: EAGLES (Girish et al., ECCV 2024, arXiv 2312.04564).

Colours above degree 0, rotations and opacities are integer latents, which one linear layer per attribute
decodes. Positions, scales and the constant colour are float32, as in the paper, which finds them too
sensitive.

Different from the paper: latents and decoders are fitted after the training by principal component analysis,
which gives the linear decoder of least squared error; a rotation has at most 4 latents (it has 4 values)
instead of 8; the integers have 8 bits and one step per attribute, and are packed with DEFLATE instead of
arithmetic coding. Left out: learning latents and decoders in training, with a straight-through estimator, and
the schedule from coarse to fine images.
"""

from pathlib import Path
from typing import Any

import numpy as np

from flexgs.errors import UserError
from flexgs.formats.arrays import read_arrays, write_arrays
from flexgs.gaussians import Gaussians, unit_quaternions
from flexgs.inputs import Layout
from flexgs.ply import checked

SIZES = {"shN": 16, "quats": 4, "opacities": 1}
"""Largest number of latents per Gaussian for each attribute."""
KIND = "latents 1"
LAYOUT: Layout = {"means": ("float32", (3, "n")), "scales": ("float32", (3, "n")),
                  "sh0": ("float32", (3, "n"))} | {
    f"{name}_{part}": shape for name in SIZES for part, shape in {
        "latents": ("int8", (f"latents of {name}", "n")),
        "decoder": ("float32", (f"latents of {name}", f"values of {name}")),
        "bias": ("float32", (f"values of {name}",))}.items()}


def write(gaussians: Gaussians, path: Path | str) -> None:
    """Write Gaussians to a file; they keep their order."""
    g, quats = gaussians, unit_quaternions(gaussians.quats)
    quats = np.where(quats[:, :1] < 0, -quats, quats)  # q and -q are the same rotation
    arrays = {name: getattr(g, name).T for name in ("means", "scales", "sh0")}
    for name, values in (("shN", g.shN.reshape(len(g), -1)), ("quats", quats),
                         ("opacities", g.opacities[:, None])):
        parts = encode(values.astype(np.float64), SIZES[name])
        arrays |= {f"{name}_{part}": a for part, a in zip(("latents", "decoder", "bias"), parts, strict=True)}
    write_arrays(path, KIND, arrays)


def read(path: Path | str) -> Gaussians:
    """Read the Gaussians of a file that write() made."""
    arrays = read_arrays(path, KIND, LAYOUT)
    plain: dict[str, Any] = {name: arrays[name].T.copy() for name in ("means", "scales", "sh0")}
    decoded = {name: decode(*(arrays[f"{name}_{part}"] for part in ("latents", "decoder", "bias")))
               for name in SIZES}
    sizes = tuple(values.shape[1] for values in decoded.values())
    if sizes[0] not in (0, 9, 24, 45) or sizes[1:] != (4, 1):
        raise UserError(f"{path}: found decoders to {sizes} values, expected 0, 9, 24 or 45, then 4 "
                        "and 1; write it again")
    shN, quats, opacities = decoded.values()
    shN = shN.reshape(len(shN), sizes[0] // 3, 3)
    return checked(Gaussians(quats=quats, opacities=opacities[:, 0], shN=shN, **plain), path)


def encode(values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode values [N, D] as latents int8 [K, N], decoder float32 [K, D] and bias float32 [D].

    K is the smaller of size and D. The latents are coordinates along the directions of largest variance, in
    one step for all, so that the largest is 127.
    """
    bias = values.mean(0)
    centred = values - bias
    components = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :size]
    latents = centred @ components
    step = np.abs(latents).max(initial=0) / 127 or 1
    return (np.rint(latents / step).astype(np.int8).T, (step * components.T).astype(np.float32),
            bias.astype(np.float32))


@np.errstate(over="ignore", invalid="ignore")  # checked() refuses what is not finite
def decode(latents: np.ndarray, decoder: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Decode latents [K, N] by the linear layer to values [N, D] float32."""
    return latents.T.astype(np.float32) @ decoder + bias
