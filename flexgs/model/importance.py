"""Global importance: how much each Gaussian does for the training views. One function per published score.

A score takes (splats, views, group) and returns [N], at least 0, higher for the more important. Of the views
only the cameras matter; the background is black and all spherical harmonics are used. Left out: scores that
need a maximum over pixels (RadSplat) or products of each pixel's gradients (PUP 3D-GS, Speedy-Splat): the
rasterizer and autograd give sums over pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.distributed import Group
from flexgs.extensions import named
from flexgs.raster import render
from flexgs.raster.contract import Contributions
from flexgs.scene import View
from flexgs.splats import Splats, quantile

Score = Callable[[Splats, Sequence[View], Group], Tensor]


def alpha_t(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """Sum of alpha*T, the weight with which the Gaussian's colour enters the images.

    Also EAGLES's influence (Girish et al. 2024) and Mini-Splatting's importance (Fang and Wang 2024).
    """
    return contributions(splats, views, group, "weight")[:, 0]


def opacity_t(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """Sum of o*T over the pixels reached: FlexGS's code, free of its races."""
    return torch.sigmoid(splats.opacities) * contributions(splats, views, group)[:, 2]


def flexgs(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """gamma(volume) * sum of alpha*T: FlexGS's paper, eq. 8-10, with LightGaussian's clamp instead of the
    misprinted max."""
    return _gamma(volume(splats, views, group)) * contributions(splats, views, group, "weight")[:, 0]


def lightgaussian(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """gamma(volume)^0.1 * o * pixels reached: LightGaussian (Fan et al. 2024), eq. 3-4."""
    gamma = _gamma(volume(splats, views, group))
    return gamma**0.1 * torch.sigmoid(splats.opacities) * contributions(splats, views, group)[:, 1]


def c3dgs(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """Sensitivity of the images to the colour: Compressed 3DGS (Niedermayr et al. 2024), whose code prunes by
    it.

    S(c) = sum over views of |dE/dc| / number of pixels of all views, E the sum of r, g and b over an image;
    the score is the maximum of S over the Gaussian's spherical-harmonics coefficients c. The sensitivity to
    its shape has another unit and can vanish where a Gaussian matters, so it stays out. For degree 0 this is
    SH_C0 * alpha_t / pixels.

    As in their code colours are not clamped at 0, or black Gaussians would count for nothing although they
    hide others. E is then linear in the coefficients: its gradient is the same at 0, where nothing is
    clamped, and the same for r, g and b.
    """
    grey = replace(splats.detach(), sh0=torch.zeros_like(splats.sh0), shN=torch.zeros_like(splats.shN))
    sh = grey.sh0.requires_grad_(), grey.shN.requires_grad_()

    @torch.enable_grad()
    def sensitivity(camera: Camera) -> Tensor:
        first, rest = torch.autograd.grad(render(grey, camera).image.sum(), sh)
        return torch.cat([first[:, None], rest], dim=1)[..., 0].abs()

    total = _sum_over_views(sensitivity, (len(splats), 1 + splats.shN.shape[1]), splats, views, group)
    return total.amax(dim=1) / sum(view.camera.width * view.camera.height for view in views)


def opacity(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """The opacity alone: Matryoshka Gaussian Splatting's order."""
    return torch.sigmoid(splats.opacities)


def volume(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """The product of the three standard deviations: an order of Matryoshka Gaussian Splatting's ablation."""
    return splats.scales.double().sum(dim=1).exp()


def footprint(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """opacity * area^0.25, an area being the product of the two larger standard deviations: for splats
    without their views.

    Our own. Of the scores that need no views it came nearest to those that do, on two captures
    (docs/deploy.md).
    """
    area = splats.scales.double().sort(dim=1).values[:, 1:].sum(dim=1).exp()
    return torch.sigmoid(splats.opacities).double() * area**0.25


SCORES: Mapping[str, Score] = {
    f.__name__: f for f in (alpha_t, opacity_t, flexgs, lightgaussian, c3dgs, opacity, volume,
                            footprint)} | {"eagles": alpha_t}


def scorer(name: str) -> Score:
    """The score of this name in SCORES, or module:name. UserError if there is none."""
    return named("--order.score", name, SCORES)


@torch.no_grad()
def score(name: str, splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """[N] float64 score by its name in SCORES, or module:name; higher is more important."""
    return scorer(name)(splats, views, group).double()


@torch.no_grad()
def contributions(splats: Splats, views: Sequence[View], group: Group,
                  which: Contributions = "all") -> Tensor:
    """[N, 3] float64 sums over views and pixels: alpha*T, number of pixels reached, T in front; [N, 1] the
    first alone."""
    def sums(camera: Camera) -> Tensor:
        out = render(splats, camera, contributions=which).contributions
        assert out is not None
        return out

    return _sum_over_views(sums, (len(splats), 3 if which == "all" else 1), splats, views, group)


def _sum_over_views(of: Callable[[Camera], Tensor], shape: tuple[int, ...], splats: Splats,
                    views: Sequence[View], group: Group) -> Tensor:
    """Sum of of(camera), each of this shape, over the views, which are split over the workers."""
    device = splats.means.device
    # float64: the sum over ranks is then exact enough
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    for i in group.my_indices(len(views)):
        total += of(views[i].camera.to(device))
    group.sum_([total])
    return total


def _gamma(volume: Tensor) -> Tensor:
    """Volume over the volume that 90 % of the Gaussians stay below, at most 1."""
    return (volume / quantile(volume, 0.9)).clamp(max=1)
