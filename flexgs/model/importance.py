"""Global importance: how much each Gaussian contributes to the training views, by published scores.

Each score is a function of (splats, views, group) that returns [N] values of at least 0, higher for more
important Gaussians. Only the cameras of the views matter; the background is black and all spherical harmonics
are used. alpha is a Gaussian's opacity at a pixel, T the transmittance in front of it, o its peak opacity.

Left out are scores that need a maximum over pixels (RadSplat) or products of each pixel's gradients (PUP
3D-GS, Speedy-Splat): the rasterizer and autograd give sums over pixels.
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
    """Sum of alpha*T over pixels: the weight of the Gaussian's colour in the images.

    The influence of EAGLES (Girish et al. 2024) and the importance of Mini-Splatting (Fang and Wang 2024).
    """
    return contributions(splats, views, group, "weight")[:, 0]


def opacity_t(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """Sum of o*T over the pixels reached, as in FlexGS's code but without its races."""
    return torch.sigmoid(splats.opacities) * contributions(splats, views, group)[:, 2]


def flexgs(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """gamma(volume) * sum of alpha*T (FlexGS, eq. 8-10, with LightGaussian's clamp for a misprinted max)."""
    return _gamma(volume(splats, views, group)) * contributions(splats, views, group, "weight")[:, 0]


def lightgaussian(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """gamma(volume)^0.1 * o * number of pixels reached (LightGaussian, Fan et al. 2024, eq. 3-4)."""
    gamma = _gamma(volume(splats, views, group))
    return gamma**0.1 * torch.sigmoid(splats.opacities) * contributions(splats, views, group)[:, 1]


def c3dgs(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """Sensitivity of the images to the colour (Compressed 3DGS, Niedermayr et al. 2024).

    S(c) = sum over views of |dE/dc| / number of pixels of all views, with E the sum of r, g and b over an
    image; the score is the maximum of S over the Gaussian's spherical-harmonics coefficients c. The
    sensitivity to the shape is left out: it has another unit and can vanish where a Gaussian matters. For
    degree 0 the score is SH_C0 * alpha_t / pixels.

    As in the authors' code, colours are not clamped at 0, or black Gaussians would count for nothing although
    they hide others. E is then linear in the coefficients, so its gradient can be taken at 0, where nothing
    is clamped, and is the same for r, g and b.
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
    """The peak opacity o, the order of Matryoshka Gaussian Splatting (Guo et al. 2026)."""
    return torch.sigmoid(splats.opacities)


def volume(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """Product of the three standard deviations, an ablation of Matryoshka Gaussian Splatting."""
    return splats.scales.double().sum(dim=1).exp()


def footprint(splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """Opacity o * area^0.25, the area being the product of the two larger deviations; needs no views.

    Our own score: on two captures (docs/deploy.md) it came nearest, of the scores without views, to those
    with views.
    """
    area = splats.scales.double().sort(dim=1).values[:, 1:].sum(dim=1).exp()
    return torch.sigmoid(splats.opacities).double() * area**0.25


SCORES: Mapping[str, Score] = {
    f.__name__: f for f in (alpha_t, opacity_t, flexgs, lightgaussian, c3dgs, opacity, volume,
                            footprint)} | {"eagles": alpha_t}


def scorer(name: str) -> Score:
    """Return the score function named in SCORES, or by module:name; UserError if there is none."""
    return named("--order.score", name, SCORES)


@torch.no_grad()
def score(name: str, splats: Splats, views: Sequence[View], group: Group) -> Tensor:
    """Compute the score of this name (see scorer) for all Gaussians, [N] float64."""
    return scorer(name)(splats, views, group).double()


@torch.no_grad()
def contributions(splats: Splats, views: Sequence[View], group: Group,
                  which: Contributions = "all") -> Tensor:
    """Sum alpha*T, the number of pixels reached, and T over views and pixels, [N, 3] float64.

    With which = "weight", sum alpha*T alone, [N, 1].
    """
    def sums(camera: Camera) -> Tensor:
        out = render(splats, camera, contributions=which).contributions
        assert out is not None
        return out

    return _sum_over_views(sums, (len(splats), 3 if which == "all" else 1), splats, views, group)


def _sum_over_views(of: Callable[[Camera], Tensor], shape: tuple[int, ...], splats: Splats,
                    views: Sequence[View], group: Group) -> Tensor:
    """Sum the tensors of(camera), of this shape, over all views; the workers share the views."""
    device = splats.means.device
    # In float64 the number of workers makes no difference that matters.
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    for i in group.my_indices(len(views)):
        total += of(views[i].camera.to(device))
    group.sum_([total])
    return total


def _gamma(volume: Tensor) -> Tensor:
    """Return the volume [N] divided by its 90th percentile, at most 1 (LightGaussian, eq. 4)."""
    return (volume / quantile(volume, 0.9)).clamp(max=1)
