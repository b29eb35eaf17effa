"""Tests of this folder need a CUDA device and gsplat; where there is none they say so and are skipped."""

import os
from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    """The GPU; FLEXGS_GPU_TESTS=cpu runs the tests on the CPU instead, which tries the tests themselves."""
    wanted = os.environ.get("FLEXGS_GPU_TESTS", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if wanted == "cuda" and not find_spec("gsplat"):
        pytest.skip("gsplat is not installed: pip install 'flexgs[cuda]'")
    return wanted
