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
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flexgs.errors import UserError
from flexgs.formats.arrays import read_arrays, write_arrays
from flexgs.inputs import Layout
from flexgs.ply import checked
from flexgs.splats import Splats

SIZES = {"shN": 16, "quats": 4, "opacities": 1}
"""Largest number of latents per Gaussian for each attribute."""
KIND = "latents 1"
LAYOUT: Layout = {"means": ("float32", (3, "n")), "scales": ("float32", (3, "n")),
                  "sh0": ("float32", (3, "n"))} | {
    f"{name}_{part}": shape for name in SIZES for part, shape in {
        "latents": ("int8", (f"latents of {name}", "n")),
        "decoder": ("float32", (f"latents of {name}", f"values of {name}")),
        "bias": ("float32", (f"values of {name}",))}.items()}


def write(splats: Splats, path: Path | str) -> None:
    """Write splats to a file; they keep their order."""
    s = splats.detach().to("cpu")
    quats = torch.nn.functional.normalize(s.quats, dim=1)
    quats = torch.where(quats[:, :1] < 0, -quats, quats)  # q and -q are the same rotation
    arrays = {name: getattr(s, name).numpy().T for name in ("means", "scales", "sh0")}
    for name, values in (("shN", s.shN.flatten(1)), ("quats", quats), ("opacities", s.opacities[:, None])):
        parts = encode(values.double().numpy(), SIZES[name])
        arrays |= {f"{name}_{part}": a for part, a in zip(("latents", "decoder", "bias"), parts, strict=True)}
    write_arrays(path, KIND, arrays)


def read(path: Path | str) -> Splats:
    """Read the Gaussians of a file that write() made."""
    arrays = read_arrays(path, KIND, LAYOUT)
    plain = {name: torch.from_numpy(arrays[name].T.copy()) for name in ("means", "scales", "sh0")}
    decoded = {name: decode(*(arrays[f"{name}_{part}"] for part in ("latents", "decoder", "bias")))
               for name in SIZES}
    sizes = tuple(values.shape[1] for values in decoded.values())
    if sizes[0] not in (0, 9, 24, 45) or sizes[1:] != (4, 1):
        raise UserError(f"{path}: found decoders to {sizes} values, expected 0, 9, 24 or 45, then 4 "
                        "and 1; write it again")
    shN, quats, opacities = decoded.values()
    shN = shN.reshape(len(shN), sizes[0] // 3, 3)
    return checked(Splats(quats=quats, opacities=opacities[:, 0], shN=shN, **cast(Any, plain)), path)


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


def decode(latents: np.ndarray, decoder: np.ndarray, bias: np.ndarray) -> Tensor:
    """Decode latents [K, N] by the linear layer to values [N, D] float32."""
    return torch.from_numpy(latents.T.astype(np.float32)) @ torch.from_numpy(decoder) + torch.from_numpy(bias)
