"""PSNR and SSIM of two images, by torchmetrics."""

from typing import cast

import torch
from torch import Tensor

PROTOCOL = {"psnr": "torchmetrics, range 1, at most 120 dB",
            "ssim": "torchmetrics, 11x11 Gaussian window, sigma 1.5, images reflected at the border"}
"""How the figures are computed, in words for results.json."""
LEAST = 6
"""Smallest width and height of an image in pixels: SSIM reflects 5 pixels at the border."""


def psnr(image: Tensor, target: Tensor) -> float:
    """Return the PSNR in dB of two images [H, W, 3] in [0, 1]; at most 120, since JSON has no infinity."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # a second to import

    return min(float(peak_signal_noise_ratio(image, target, data_range=1.0)), 120.0)


def ssim(image: Tensor, target: Tensor) -> float:
    """Return the mean SSIM (Wang et al. 2004), at most 1, of two float images [H, W, 3] in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (x.permute(2, 0, 1)[None] for x in (image, target))
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN's TF32 is too imprecise for variances
        return float(cast(Tensor, structural_similarity_index_measure(a, b, data_range=1.0)))
