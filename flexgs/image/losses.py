"""The photometric loss of 3D Gaussian Splatting: L1 + SSIM."""

import torch
from torch import Tensor

from flexgs.camera import Camera

SSIM_TAPS, SSIM_SIGMA = 11, 1.5  # the window of Wang et al. 2004, as in 3DGS
C1, C2 = 0.01**2, 0.03**2


def photometric(image: Tensor, target: Tensor, *, l1: float = 0.8, ssim: float = 0.2,
                mask: Tensor | None = None) -> Tensor:  # fmt: skip
    """Return l1 * mean |image - target| + ssim * (1 - SSIM), a scalar with a gradient to image only.

    The defaults are those of 3DGS (Kerbl et al. 2023, eq. 7).

    Args:
        image: [H, W, 3] float, in [0, 1] or a little beyond.
        target: [H, W, 3] float in [0, 1], or uint8, which is divided by 255.
        l1: the weight of the mean absolute error.
        ssim: the weight of 1 - SSIM.
        mask: [H, W] bool. Pixels where it is False add neither error nor gradient, but are counted in the
            means over all H * W pixels.
    """
    target = as_float(target.detach(), image.dtype)
    if mask is not None:
        image = torch.where(mask[..., None], image, target)
    if image.device.type == "cpu" and image.dtype == torch.float32:
        from flexgs.image.ssim import L1SSIM  # numba takes a second to import

        return L1SSIM.apply(image, target, l1, ssim)
    return l1 * (image - target).abs().mean() + ssim * (1 - ssim_map(image, target).mean())


def halved(camera: Camera, target: Tensor, mask: Tensor | None) -> tuple[Camera, Tensor, Tensor | None]:
    """Return camera, target and mask at half the size: a pixel is a mean, masked out if any part of it is."""
    size = camera.height // 2, camera.width // 2

    def mean(image: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], size=size,
                                               mode="area")[0].permute(1, 2, 0)

    small = mean(as_float(target, torch.float32)).contiguous()
    small_mask = None if mask is None else mean(mask[:, :, None].float())[:, :, 0] == 1
    return camera.scaled(size[1], size[0]), small, small_mask


def as_float(image: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the image in a float dtype; uint8 is divided by 255."""
    return image.to(dtype) / 255 if image.dtype == torch.uint8 else image.to(dtype)


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Return the SSIM [3, H, W] at each pixel of float images [H, W, 3], with zeros beyond the border."""
    taps = torch.arange(SSIM_TAPS, dtype=a.dtype, device=a.device) - SSIM_TAPS // 2
    taps = torch.exp(-0.5 * (taps / SSIM_SIGMA) ** 2)
    taps = taps / taps.sum()
    a, b = a.permute(2, 0, 1), b.permute(2, 0, 1)
    fields = torch.stack([a, b, a * a + b * b, a * b]).flatten(0, 1)[None]
    # One group per field is several times faster on a CPU, and keeps cuDNN out, whose TF32 is too imprecise
    # for variances.
    rows, columns = taps.view(1, 1, 1, -1).repeat(12, 1, 1, 1), taps.view(1, 1, -1, 1).repeat(12, 1, 1, 1)
    fields = torch.nn.functional.conv2d(fields, rows, padding=(0, SSIM_TAPS // 2), groups=12)
    fields = torch.nn.functional.conv2d(fields, columns, padding=(SSIM_TAPS // 2, 0), groups=12)
    mu_a, mu_b, squares, product = fields.view(4, *a.shape)
    means, cross = mu_a * mu_a + mu_b * mu_b, mu_a * mu_b
    top = (2 * cross + C1) * (2 * (product - cross) + C2)
    return top / ((means + C1) * (squares - means + C2))
