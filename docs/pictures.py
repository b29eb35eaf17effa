"""Make the pictures of a real capture that are in docs/: a row of cuts, and the slider as an animation.

    python docs/pictures.py --run runs/flexgs/fox --scene ~/captures/fox
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from flexgs.commands.guard import guard
from flexgs.config import percent
from flexgs.device import pick_device
from flexgs.files import atomic_file
from flexgs.model.elastic import ElasticModel
from flexgs.options import parse
from flexgs.raster import render
from flexgs.report.pictures import write_grid
from flexgs.scene.load import load_capture

RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.3, 0.5, 1.0)
"""Where the slider stops in the animation."""
HEIGHT, BAR = 400, 34
"""Size in pixels of the pictures of the animation, and of the strip with the slider below them."""
MILLISECONDS = 700


@dataclass
class Pictures:
    """Make the pictures of a real capture that are in docs/."""

    run: Path
    scene: Path
    view: int = 0
    """Which test view is shown, counted from 0."""
    output: Path = Path(__file__).parent

    def __call__(self) -> None:
        pick_device("cpu")
        model = ElasticModel.load(self.run)
        scene = load_capture(self.scene, model.config)
        write_grid(model, scene, model.config.evaluation.ratios, model.config.background,
                   self.output / f"{scene.name}.png", views=1)
        view = scene.test[self.view]
        photograph = _enlarged(view.image().numpy())
        frames = []
        for ratio in RATIOS:
            cut = model.cut(ratio)
            with torch.no_grad():
                image = render(cut, view.camera, background=torch.tensor(model.config.background)).image
            pixels = (255 * image.clamp(0, 1) + 0.5).byte().numpy()
            frames.append(_frame(_enlarged(pixels), photograph, ratio, len(cut)))
        with atomic_file(self.output / "slider.webp") as out:
            frames[0].save(out, save_all=True, append_images=[*frames[1:], *frames[-2:0:-1]],
                           duration=MILLISECONDS, loop=0, quality=80, method=6)
        for name in (f"{scene.name}.png", "slider.webp"):
            print(self.output / name)


def _enlarged(pixels: np.ndarray) -> Image.Image:
    height, width, _ = pixels.shape
    return Image.fromarray(pixels).resize((round(width * HEIGHT / height), HEIGHT), Image.Resampling.BICUBIC)


def _frame(model: Image.Image, photograph: Image.Image, ratio: float, count: int) -> Image.Image:
    """The model beside the photograph, above a slider whose position is logarithmic."""
    frame = Image.new("RGB", (2 * model.width + 6, HEIGHT + BAR), "white")
    frame.paste(model, (0, 0))
    frame.paste(photograph, (model.width + 6, 0))
    draw = ImageDraw.Draw(frame)
    middle, left, right = HEIGHT + BAR // 2, 10, model.width - 10
    at = left + (right - left) * (1 + np.log10(ratio) / 2)
    draw.line((left, middle, right, middle), "silver", 4)
    draw.line((left, middle, at, middle), "steelblue", 4)
    draw.ellipse((at - 8, middle - 8, at + 8, middle + 8), "steelblue")
    draw.text((model.width + 6, middle), f"{percent(ratio)}: {count:,} Gaussians", "black",
              ImageFont.load_default(15), anchor="lm")
    return frame


if __name__ == "__main__":
    sys.exit(guard(lambda: parse(Pictures, sys.argv[1:], "pictures.py")()))
