"""LPIPS (Zhang et al. 2018) through torchmetrics; backbones from torchvision or, where nothing may be
downloaded, a folder.

The folder holds torchvision's own files, vgg16-397923af.pth and alexnet-owt-7be5be79.pth, or their
convolution layers alone, vgg16_features_f16.pth and alexnet_features_f16.pth: state dictionaries with the
keys features.N.weight and features.N.bias; other keys are passed over. They are read with
torch.load(weights_only=True), which makes tensors and plain containers and runs nothing that a file names;
names, shapes and numbers are then checked. The linear heads come with torchmetrics.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flexgs.errors import UserError
from flexgs.inputs import check_tensors, regular_file

WEIGHTS_VARIABLE = "FLEXGS_LPIPS_WEIGHTS"
CURE = "Give a folder of weights: evaluation.lpips_weights"
FILES = {"vgg": ("vgg16-397923af.pth", "vgg16_features_f16.pth"),
         "alex": ("alexnet-owt-7be5be79.pth", "alexnet_features_f16.pth")}
Range = Literal["[-1, 1]", "[0, 1]"]
LEAST = 32
"""Pixels that an image must have across and down: AlexNet leaves nothing of smaller ones."""


class Lpips:
    """LPIPS of two images; callable. Not available in every environment: see load()."""

    def __init__(self, net: nn.Module, inputs: Range):
        self.net, self.inputs = net.eval(), inputs

    @torch.no_grad()
    def __call__(self, image: Tensor, target: Tensor) -> float:
        """Of [H, W, 3] images in [0, 1]; lower is better."""
        a, b = (x.permute(2, 0, 1)[None].float() for x in (image, target))
        return float(self.net.to(image.device)(a, b, normalize=self.inputs == "[-1, 1]"))


def load(net: Literal["vgg", "alex"], weights: str | None = None, inputs: Range = "[-1, 1]") -> Lpips | str:
    """LPIPS with this backbone, or the reason why it cannot be had here.

    weights: the folder described above (default: $FLEXGS_LPIPS_WEIGHTS; without either, torchvision's
    downloaded ones).
    inputs: the range that the network is given. [-1, 1] is what LPIPS was made for; FlexGS's figures come
    from [0, 1]. UserError if weights is given and does not hold what it should.
    """
    folder = weights or os.environ.get(WEIGHTS_VARIABLE)
    if not folder and find_spec("torchvision") is None:
        return f"its backbone cannot be had: torchvision is not installed. {CURE}"
    from torchmetrics.functional.image import lpips as module  # a second to import

    original = module._get_tv_model_features
    if folder:
        features = _features(net, _file(net, Path(folder)))
        # torchmetrics would ask torchvision, which may not be there
        module._get_tv_model_features = lambda *_: features
    try:
        return Lpips(module._NoTrainLpips(net=net), inputs)
    except (ImportError, RuntimeError, OSError) as e:
        return f"its backbone cannot be had: {str(e).splitlines()[0]} {CURE}"
    finally:
        module._get_tv_model_features = original


def _file(net: str, folder: Path) -> Path:
    """The file of the backbone in the folder."""
    for name in FILES[net]:
        if (folder / name).exists():
            return regular_file(folder / name)
    raise UserError(f"{folder}: found no LPIPS backbone {net}, expected "
                    f"{' or '.join(FILES[net])} in this folder")


def _features(net: str, path: Path) -> nn.Sequential:
    """The layers of torchvision's `features`, filled from path."""
    # (inputs, outputs, size, stride, padding) of a convolution, or what makes another layer
    plans: dict[str, tuple] = {
        "alex": ((3, 64, 11, 4, 2), nn.ReLU, _pool(3), (64, 192, 5, 1, 2), nn.ReLU, _pool(3),
                 (192, 384, 3, 1, 1), nn.ReLU, (384, 256, 3, 1, 1), nn.ReLU, (256, 256, 3, 1, 1), nn.ReLU,
                 _pool(3)),
        "vgg": tuple(layer for inputs, outputs,
                     count in ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
                     for i in range(count + 1) for layer in (
                         ((inputs if i == 0 else outputs, outputs, 3, 1, 1), nn.ReLU) if i < count
                         else (_pool(2),))),
    }
    layers = nn.Sequential(*(nn.Conv2d(*layer) if isinstance(layer, tuple) else layer()
                             for layer in plans[net]))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {k: v.float() for k, v in state.items() if k.startswith("features.")}
    except Exception as e:  # torch.load raises many kinds for broken files
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{path}: not the weights of the {net} backbone ({reason})") from None
    check_tensors(found, {f"features.{k}": ("float32", tuple(v.shape)) for k,
                          v in layers.state_dict().items()}, str(path))
    layers.load_state_dict({k.removeprefix("features."): v for k, v in found.items()})
    return layers


def _pool(size: int) -> Callable[[], nn.Module]:
    return lambda: nn.MaxPool2d(size, 2)
