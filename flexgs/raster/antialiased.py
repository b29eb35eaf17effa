"""The anti-aliased mode: an opacity that keeps what a Gaussian adds to the image when it is blurred.

The rasterizer adds a variance of eps2d square pixels to every projected Gaussian, so that none is thinner
than a pixel; small and distant ones look too thick by that. The 2D Mip filter of Mip-Splatting (Yu et al.
2024) multiplies the opacity by the ratio of the areas before and after, as gsplat does with
rasterize_mode="antialiased".
"""

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.splats import Splats, rotation_matrices


def compensation(splats: Splats, camera: Camera, eps2d: float) -> Tensor:
    """Return sqrt(det S / det(S + eps2d I)), [N] from 0 to 1, of the projected covariances S in pixels.

    S is that of EWA splatting (Zwicker et al. 2001) with gsplat's limits on x/z and y/z. Differentiable in
    means, quats and scales; 1 for Gaussians before the near plane, which are not drawn.
    """
    means = splats.means
    viewmat, K, W, H = camera.viewmat.to(means), camera.K.to(means), camera.width, camera.height
    R, (fx, fy, cx, cy) = viewmat[:3, :3], (K[0, 0], K[1, 1], K[0, 2], K[1, 2])
    p = means @ R.T + viewmat[:3, 3]
    drawn = p[:, 2] >= camera.near
    x, y, z = torch.where(drawn[:, None], p, torch.ones_like(p)).unbind(-1)
    u = (x / z).clamp(-(cx / fx + 0.15 * W / fx), (W - cx) / fx + 0.15 * W / fx)
    v = (y / z).clamp(-(cy / fy + 0.15 * H / fy), (H - cy) / fy + 0.15 * H / fy)
    shape = R @ (rotation_matrices(splats.quats) * splats.scales.exp()[:, None, :])
    across = (fx / z)[:, None] * (shape[:, 0] - u[:, None] * shape[:, 2])
    down = (fy / z)[:, None] * (shape[:, 1] - v[:, None] * shape[:, 2])
    traces = (across * across + down * down).sum(-1)
    # det S as the squared area of a parallelogram: never negative, unlike the difference of two products
    before = torch.linalg.cross(across, down).square().sum(-1)
    after = before + eps2d * traces + eps2d**2
    return torch.where(drawn, (before / after).clamp_min(1e-12).sqrt(), torch.ones_like(z))
