"""Peak signal-to-noise ratio."""

import torch
from torch import Tensor


def psnr(image: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images [H, W, 3] in [0, 1]."""
    return float(-10 * torch.log10((image - target).square().mean().clamp(min=1e-12)))
