"""Which device of this machine is used, and when it is done."""

import time

import torch

from flexgs.errors import UserError


def pick_device(name: str) -> str:
    """The torch device for --device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise UserError(f"--device {name}: expected cpu, cuda or auto")
    if name == "cpu":
        torch.set_num_threads(1)  # the rasterizer has its own threads, and torch's spin while they wait
    return name


def clock(device: torch.device) -> float:
    """Seconds, when all that device was given to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
