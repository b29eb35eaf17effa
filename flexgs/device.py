"""The torch device to compute on, and a clock that waits for it."""

import time

import torch

from flexgs.errors import UserError


def pick_device(name: str) -> str:
    """Return the torch device that --device names; UserError if it is unknown or not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise UserError(f"--device {name}: expected cpu, cuda or auto")
    if name == "cpu":
        torch.set_num_threads(1)  # the rasterizer has its own threads, and idle threads of torch spin
    return name


def clock(device: torch.device) -> float:
    """Return time.perf_counter() after all work queued on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
