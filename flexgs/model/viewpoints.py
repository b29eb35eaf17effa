"""Viewpoints for a model that comes without cameras, found by looking at it.

From where it was trained, a model fills the image and is sharp; from elsewhere there are holes, floaters
close to the camera and needles seen from the side. So viewpoints are drawn at random, judged by both in small
renders, and the best are kept and varied, as in an evolution strategy. These come close; so some more look at
the whole from a sphere around it, as one looks at an object, from where it is about as sharp.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexgs.camera import FARTHEST, Camera, look_at
from flexgs.errors import UserError
from flexgs.raster import render
from flexgs.seeds import generator
from flexgs.splats import Splats

FIRST, ROUNDS, CHILDREN = 300, 3, 3
"""Viewpoints drawn at random, rounds of variation, and variations of each viewpoint in a round."""
SMALL = (64, 48)
"""Width and height in pixels of the renders that viewpoints are judged by."""
FOV = 45.0
"""Vertical angle of view in degrees."""
AWAY = 4.0
"""Radius of the sphere, in median distances of the Gaussians from their middle."""
SHARP = 1.5
"""Largest blur from the sphere, in mean blurs of the viewpoints that were searched for."""
SHARPNESS = 5.0
"""Weight of the blur, as a fraction of the width, against the covered fraction of the image."""
DETAIL = 6.0
"""Pixels across the standard deviation of what is seen: what a camera needs to show a model's detail."""
LEAST_SEEN = 0.001
"""Covered fraction of the images below which cameras look elsewhere."""
CLOSEST = 1e-6
"""Median distance of the Gaussians from their middle, in world units, below which float32 fails a search."""
WIDEST = 800
"""Most pixels across a camera, which bounds the time of a render."""


def viewpoints(splats: Splats, count: int = 48) -> list[Camera]:
    """Search for the cameras that show splats best, and add some around it; deterministic.

    Some thousands of Gaussians are enough to search with: merge a large model first. The cameras are of the
    size of SMALL: see at_detail(). UserError for Gaussians that are all at one place, or too far apart.
    """
    draws = generator(0, "viewpoints")
    seen = torch.sigmoid(splats.opacities) * (splats.scales.sum(1) - splats.scales.amin(1)).exp()
    chances = seen.double().sqrt().cumsum(0)
    middle = splats.means.median(0).values
    reach = float((splats.means.double() - middle).norm(dim=1).median())
    if not CLOSEST < reach < FARTHEST:
        raise UserError(f"found Gaussians with a median distance of {reach:g} from their middle, expected "
                        f"{CLOSEST:g} to {FARTHEST:g} to search for viewpoints; give the cameras of a "
                        "capture")

    def target() -> Tensor:
        drawn = torch.rand((), generator=draws, dtype=torch.float64) * chances[-1]
        return splats.means[int(torch.searchsorted(chances, drawn).clamp(max=len(splats) - 1))]

    def camera(eye: Tensor, at: Tensor) -> Camera:
        near = 1e-3 * float((at - eye).norm().clamp(min=1e-6))
        return look_at(eye, at, _direction(draws), *SMALL, FOV, near, splats.origin)

    def judged(eye: Tensor, at: Tensor) -> tuple[float, Camera, Tensor, Tensor]:
        covered, blur = _seen(splats, made := camera(eye, at))
        return covered - SHARPNESS * blur, made, eye, at

    pool = []
    for _ in range(FIRST):
        distance = reach / 4 * 16 ** float(torch.rand((), generator=draws))
        pool.append(judged(middle + distance * _direction(draws), target()))
    for _ in range(ROUNDS):
        best = sorted(pool, key=lambda one: -one[0])[:count]
        pool = list(best)
        for _, _, eye, at in best:
            for child in range(CHILDREN):
                moved = eye + (at - eye).norm() / 4 * torch.randn(3, generator=draws)
                pool.append(judged(moved, target() if child % 2 else at))
    found = [made for _, made, _, _ in sorted(pool, key=lambda one: -one[0])[:count]]
    blur = sum(_seen(splats, made)[1] for made in found) / count
    around = (camera(middle + AWAY * reach * _direction(draws), middle) for _ in range(count // 2))
    outside = [made for made in around if _seen(splats, made)[1] <= SHARP * blur]
    return [*found[:count - len(outside)], *outside]


def at_detail(splats: Splats, cameras: Sequence[Camera]) -> list[Camera]:
    """Enlarge cameras that are too small to show half of the detail of splats; reduce those beyond WIDEST.

    UserError for cameras that see next to nothing of splats.
    """
    some = cameras[::max(1, len(cameras) // 12)]
    small = [c.scaled(SMALL[0], max(1, round(SMALL[0] * c.height / c.width))) for c in some]
    covered, blurs = torch.tensor([_seen(splats, camera) for camera in small]).T
    if covered.mean() < LEAST_SEEN:
        raise UserError("found cameras whose images show nothing of it, expected those of its own capture")
    blur = float(blurs.log().mean().exp())
    width = round(min(max(DETAIL / blur, SMALL[0]), WIDEST))
    return [c if width / 2 <= c.width <= WIDEST else
            c.scaled(width, max(1, round(width * c.height / c.width))) for c in cameras]


def _direction(draws: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(3, generator=draws), dim=0)


def _seen(splats: Splats, camera: Camera) -> tuple[float, float]:
    """Return the fraction of the image that is covered, and its blur.

    The blur is the mean standard deviation of the Gaussians in the image, weighted by what they contribute,
    as a fraction of the width.
    """
    with torch.no_grad():
        out = render(splats, camera, contributions="weight")
    assert out.contributions is not None
    weight = out.contributions[:, 0]
    sizes = (out.radii.amax(1) / 3.33 / camera.width).clamp(1e-3, 1)
    blur = float(((weight / weight.sum().clamp(min=1e-9)) * sizes.log()).sum().exp())
    return float(out.alpha.mean()), blur
