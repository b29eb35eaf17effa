"""Global importance: how much each Gaussian does for the training views. One function per published score."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.raster import render
from flexgs.scene import View
from flexgs.splats import Splats


@torch.no_grad()
def contributions(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """[N, 3] sums over views and pixels: alpha*T, number of pixels reached, T in front. Views are split over the workers."""
    device = splats.means.device
    total = torch.zeros(len(splats), 3, dtype=torch.float64, device=device)  # float64: the sum over ranks is then exact enough
    for i in group.share(len(views)):
        out = render(splats, views[i].camera.to(device), contributions=True)
        assert out.contributions is not None
        total += out.contributions
    group.sum_([total])
    return total


def alpha_t(splats: Splats, sums: Tensor) -> Tensor:
    """Sum of alpha*T, the weight with which the Gaussian's colour enters the images."""
    return sums[:, 0]


def opacity_t(splats: Splats, sums: Tensor) -> Tensor:
    """Sum of o*T over the pixels reached: FlexGS's code, free of its races."""
    return torch.sigmoid(splats.opacities) * sums[:, 2]


def flexgs(splats: Splats, sums: Tensor) -> Tensor:
    """gamma(volume) * sum of alpha*T: FlexGS's paper, eq. 8-10, with LightGaussian's clamp instead of the misprinted max."""
    return _gamma(splats) * sums[:, 0]


def lightgaussian(splats: Splats, sums: Tensor) -> Tensor:
    """gamma(volume)^0.1 * o * pixels reached: LightGaussian (Fan et al. 2024), eq. 3-4."""
    return _gamma(splats) ** 0.1 * torch.sigmoid(splats.opacities) * sums[:, 1]


def opacity(splats: Splats, sums: Tensor) -> Tensor:
    """The opacity alone: Matryoshka Gaussian Splatting's order."""
    return torch.sigmoid(splats.opacities)


SCORES: dict[str, Callable[[Splats, Tensor], Tensor]] = {
    f.__name__: f for f in (alpha_t, opacity_t, flexgs, lightgaussian, opacity)}


def score(name: str, splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """[N] float64 score by its name in SCORES; higher is more important."""
    if name not in SCORES:
        raise UserError(f"--order.score {name}: unknown; expected one of {', '.join(SCORES)}")
    with torch.no_grad():
        return SCORES[name](splats, contributions(splats, views, group)).double()


def _gamma(splats: Splats) -> Tensor:
    """Volume over the volume that 90 % of the Gaussians stay below, at most 1."""
    volume = splats.scales.double().sum(dim=1).exp()
    return (volume / volume.quantile(0.9)).clamp(max=1)
