"""PSNR, LPIPS and what the protocol says of them."""


import pytest
import torch
from conftest import random_splats, shared

from flexgs import config as cfg
from flexgs.config import Config, EvaluationConfig
from flexgs.errors import UserError
from flexgs.evaluate import evaluate
from flexgs.image import lpips
from flexgs.image.psnr import psnr
from flexgs.model.elastic import ElasticModel
from flexgs.model.transform import Transform


def test_psnr_of_a_known_error():
    image = torch.full((8, 8, 3), 0.5)
    assert psnr(image, image + 0.1) == pytest.approx(20.0, abs=1e-4)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips(net):
    """Zero for equal images, larger for a larger change, not the same in the two input ranges."""
    weights = str(shared("weights"))
    measure = lpips.load(net, weights)
    g = torch.Generator().manual_seed(0)
    image = torch.rand(64, 64, 3, generator=g)
    noise = torch.randn(64, 64, 3, generator=g)
    small, large = (measure((image + s * noise).clamp(0, 1), image) for s in (0.05, 0.3))
    assert measure(image, image) == 0 < small < large
    assert lpips.load(net, weights, "[0, 1]")((image + 0.3 * noise).clamp(0, 1), image) != large


def test_wrong_weights_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"expected vgg16-397923af\.pth or"):
        lpips.load("vgg", str(tmp_path))
    (tmp_path / lpips.FILES["vgg"][0]).write_bytes(b"not a state dictionary")
    with pytest.raises(UserError, match="not the weights of the vgg backbone"):
        lpips.load("vgg", str(tmp_path))
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / lpips.FILES["alex"][0])
    with pytest.raises(UserError, match=r"alexnet.*found no 'features"):
        lpips.load("alex", str(tmp_path))


def test_torchvisions_own_file_is_read(tmp_path):
    """Whole models in the old format of torch.save, as torchvision has them: with the classifier, which LPIPS
    does not use."""
    plans = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3),
             10: (256, 256, 3, 3)}
    state = {f"features.{i}.{name}": torch.randn(shape if name == "weight" else shape[:1])
             for i, shape in plans.items() for name in ("weight", "bias")}
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save({**state, "classifier.1.weight": torch.zeros(3, 3)}, path,
               _use_new_zipfile_serialization=False)
    net = lpips.load("alex", str(tmp_path))
    image = torch.rand(64, 64, 3)
    assert isinstance(net, lpips.Lpips) and net(image, image) == 0 < net(image, 1 - image)
    state["features.0.bias"][0] = float("nan")
    torch.save(state, path)
    with pytest.raises(UserError, match=r"NaN or infinite numbers in features\.0\.bias"):
        lpips.load("alex", str(tmp_path))


def test_what_was_not_computed_says_why(scene, monkeypatch):
    """Never silently skipped: a None in the table has its reason in the protocol."""
    monkeypatch.delenv(lpips.WEIGHTS_VARIABLE, raising=False)
    model = ElasticModel(random_splats(50), Transform(), Config(transform=cfg.TransformConfig("none")))
    measured = evaluate(model, scene, EvaluationConfig((0.5,)), (0.0, 0.0, 0.0))
    for net in ("vgg", "alex"):
        said, value = measured["protocol"][f"lpips_{net}"], measured["ratios"]["0.5"][f"lpips_{net}"]
        assert said.startswith("not computed, because") if value is None else said == "inputs in [-1, 1]"
