"""LPIPS (Zhang et al. 2018) by the lpips package, whose networks are torchvision's.

torchvision downloads the weights of a network, or they are read from a folder that holds torchvision's own
files, vgg16-397923af.pth and alexnet-owt-7be5be79.pth, or their convolutions alone, vgg16_features_f16.pth
and alexnet_features_f16.pth. Such a file is a state dictionary whose layers are named features.N.weight as in
torchvision, net.sliceK.N.weight as in lpips, or N.weight; other entries are ignored. It is read with
torch.load(weights_only=True), which runs nothing that a file names; names, shapes and numbers are then
checked. The linear layers behind the network come with the lpips package.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexgs.errors import UserError
from flexgs.inputs import check_tensors, regular_file
from flexgs.urls import first_line

WEIGHTS_VARIABLE = "FLEXGS_LPIPS_WEIGHTS"
FILES = {"vgg": ("vgg16-397923af.pth", "vgg16_features_f16.pth"),
         "alex": ("alexnet-owt-7be5be79.pth", "alexnet_features_f16.pth")}
LAYER = re.compile(r"(?:features\.|(?:net\.)?slice\d\.)?(\d+\.(?:weight|bias))")
Range = Literal["[-1, 1]", "[0, 1]"]
LEAST = 32
"""Smallest width and height of an image in pixels: AlexNet's layers leave nothing of smaller ones."""


class Lpips:
    """LPIPS with one network, a callable for two images; made by load()."""

    def __init__(self, net: nn.Module, inputs: Range):
        self.net, self.inputs = net.eval(), inputs

    @torch.no_grad()
    def __call__(self, image: Tensor, target: Tensor) -> float:
        """Return the LPIPS of two images [H, W, 3] in [0, 1]; lower is better."""
        a, b = (x.permute(2, 0, 1)[None].float() for x in (image, target))
        return float(self.net.to(image.device)(a, b, normalize=self.inputs == "[-1, 1]"))


def load(net: Literal["vgg", "alex"], weights: str | None = None, inputs: Range = "[-1, 1]") -> Lpips | str:
    """Return LPIPS with this network, or one line on why it is not available and what to do.

    Args:
        net: the network whose features are compared.
        weights: a folder of weights (see the module's docstring), by default $FLEXGS_LPIPS_WEIGHTS; without
            either, torchvision downloads them.
        inputs: the range of the network's inputs: [-1, 1] for LPIPS as published, [0, 1] for FlexGS's.

    Raises:
        UserError: the folder does not hold the network's weights.
    """
    folder = weights or os.environ.get(WEIGHTS_VARIABLE)
    path = _file(net, Path(folder)) if folder else None
    layers = read_layers(path) if path else None
    if reason := unavailable():
        return reason
    from lpips import LPIPS
    from torchvision import models

    if layers is None:
        source = models.VGG16_Weights.IMAGENET1K_V1 if net == "vgg" else models.AlexNet_Weights.IMAGENET1K_V1
        try:
            layers = _layers(source.get_state_dict(check_hash=True, weights_only=True))
        except (RuntimeError, OSError) as e:  # RuntimeError: the hash is not the one torchvision expects
            return (f"{source.url} cannot be downloaded ({first_line(e)}); give a folder of weights: "
                    "evaluation.lpips_weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision with deprecated arguments
        measure = LPIPS(net=net, pnet_rand=True, verbose=False)
    fill(measure.net, layers, str(path or "torchvision's weights"))
    return Lpips(measure, inputs)


def unavailable() -> str | None:
    """Return one line on why LPIPS is not available here and what to install; None if it is available."""
    try:
        import lpips  # noqa: F401
    except ModuleNotFoundError as e:
        return f"{e.name} is not installed: pip install 'flexgs[lpips]'"
    except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision made for another torch
        return (f"torchvision cannot be imported ({first_line(e)}): install the torchvision that is made for "
                f"torch {torch.__version__}")
    return None


def read_layers(path: Path) -> dict[str, Tensor]:
    """Read the layers of a file of weights as {"0.weight": float32, ...}; UserError if there are none."""
    regular_file(path)
    try:
        found = _layers(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:  # torch.load raises many kinds for broken files
        raise UserError(f"{path}: not the weights of an LPIPS network ({first_line(e)})") from None
    if not found:
        raise UserError(f"{path}: found no layers, expected a state dictionary with "
                        "features.0.weight and so on")
    return found


def fill(network: nn.Module, layers: Mapping[str, Tensor], where: str) -> None:
    """Load layers into the network of LPIPS; UserError unless their names, shapes and numbers fit."""
    own = {match[1]: (name, tuple(value.shape)) for name, value in network.state_dict().items()
           if (match := LAYER.fullmatch(name))}
    check_tensors(layers, {key: ("float32", shape) for key, (_, shape) in own.items()}, where)
    network.load_state_dict({own[key][0]: value for key, value in layers.items()})


def _layers(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {match[1]: value.float() for name, value in state.items() if (match := LAYER.fullmatch(name))}


def _file(net: str, folder: Path) -> Path:
    """Return the file of the network's weights in the folder; UserError if there is none."""
    for name in FILES[net]:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder}: found no LPIPS backbone {net}, expected "
                    f"{' or '.join(FILES[net])} in this folder")
