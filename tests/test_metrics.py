"""PSNR, LPIPS and what the protocol says of them."""
import sys
from collections import OrderedDict

import pytest
import torch
from conftest import random_splats, shared

from flexgs import config as cfg
from flexgs.config import Config, EvaluationConfig
from flexgs.errors import UserError
from flexgs.evaluate import evaluate
from flexgs.image import lpips
from flexgs.image.quality import psnr
from flexgs.model.elastic import ElasticModel
from flexgs.model.transform import Transform


def test_psnr_of_a_known_error():
    image = torch.full((8, 8, 3), 0.5)
    assert psnr(image, image + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr(image, image) == 120  # no infinity, which JSON does not have


@pytest.mark.parametrize(("net", "small", "large"),
                         [("vgg", 0.013914, 0.168011), ("alex", 0.004286, 0.063157)])
def test_lpips(net, small, large):
    """The figures of torchmetrics, whose heads are the same; zero for equal images; another figure in the
    other range."""
    if reason := lpips.unavailable():
        pytest.skip(reason)
    weights = str(shared("weights"))
    measure = lpips.load(net, weights)
    g = torch.Generator().manual_seed(0)
    image = torch.rand(64, 64, 3, generator=g)
    noise = torch.randn(64, 64, 3, generator=g)
    found = [measure((image + s * noise).clamp(0, 1), image) for s in (0.05, 0.3)]
    assert measure(image, image) == 0 and found == pytest.approx([small, large], abs=1e-4)
    assert lpips.load(net, weights, "[0, 1]")((image + 0.3 * noise).clamp(0, 1),
                                              image) != pytest.approx(large, abs=1e-3)


@pytest.mark.parametrize(("source", "reason"), [
    ("raise ModuleNotFoundError(name='lpips')", "lpips is not installed: pip install 'flexgs[lpips]'"),
    ("raise RuntimeError('operator torchvision::nms does not exist\\nmore')",
     "(operator torchvision::nms does not exist): install the torchvision that is made for "
     f"torch {torch.__version__}")])
def test_a_package_that_cannot_be_imported(source, reason, tmp_path, monkeypatch, scene):
    """The second is what a torchvision raises that was made for another torch."""
    (tmp_path / "lpips.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.delenv(lpips.WEIGHTS_VARIABLE, raising=False)
    assert lpips.load("vgg").endswith(reason)
    model = ElasticModel(random_splats(50), Transform(), Config(transform=cfg.TransformConfig("none")))
    measured = evaluate(model, scene, EvaluationConfig((0.5,)), (0.0, 0.0, 0.0))
    assert measured["protocol"]["lpips_vgg"] == f"not computed, because {lpips.load('vgg')}"
    assert measured["ratios"]["0.5"]["lpips_vgg"] is None


def test_wrong_weights_are_a_user_error(tmp_path):
    """Whether or not LPIPS can be computed here."""
    with pytest.raises(UserError, match=r"expected vgg16-397923af\.pth or"):
        lpips.load("vgg", str(tmp_path))
    (tmp_path / lpips.FILES["vgg"][0]).write_bytes(b"not a state dictionary")
    with pytest.raises(UserError, match="not the weights of an LPIPS network"):
        lpips.load("vgg", str(tmp_path))
    torch.save({"classifier.1.weight": torch.zeros(3)}, tmp_path / lpips.FILES["alex"][0])
    with pytest.raises(UserError, match=r"alexnet.*found no layers, expected .*features\.0\.weight"):
        lpips.load("alex", str(tmp_path))


class Sliced(torch.nn.Module):
    """Two layers under the names that lpips has for them."""

    def __init__(self):
        super().__init__()
        self.slice1 = torch.nn.Sequential(OrderedDict({"0": torch.nn.Conv2d(3, 4, 5), "1": torch.nn.ReLU()}))
        self.slice2 = torch.nn.Sequential(OrderedDict({"3": torch.nn.Conv2d(4, 6, 3)}))


@pytest.mark.parametrize("names", ["features.{n}", "net.slice{k}.{n}", "slice{k}.{n}", "{n}"])
def test_names_of_layers(names, tmp_path):
    """torchvision's whole models in the old format of torch.save, and others, with what LPIPS does not use;
    half floats."""
    shapes = {(1, 0): (4, 3, 5, 5), (2, 3): (6, 4, 3, 3)}
    values = {(k, n, part): torch.randn(shape if part == "weight" else shape[:1]).half()
              for (k, n), shape in shapes.items() for part in ("weight", "bias")}
    state = {f"{names.format(k=k, n=n)}.{part}": value for (k, n, part), value in values.items()}
    path = tmp_path / "weights.pth"
    torch.save({**state, "classifier.1.weight": torch.zeros(3, 3), "lin0.model.1.weight": torch.zeros(3)},
               path, _use_new_zipfile_serialization=False)
    network = Sliced()
    lpips.fill(network, lpips.read_layers(path), str(path))
    found = network.state_dict()
    assert len(found) == 4
    assert all(torch.equal(found[f"slice{k}.{n}.{part}"], value.float()) for (k, n, part),
               value in values.items())


def test_layers_that_do_not_fit():
    network = Sliced()
    layers = {"0.weight": torch.zeros(4, 3, 5, 5), "0.bias": torch.zeros(4),
              "3.weight": torch.zeros(6, 4, 3, 3)}
    with pytest.raises(UserError, match=r"here: found no '3\.bias'"):
        lpips.fill(network, layers, "here")
    layers["3.bias"] = torch.zeros(7)
    with pytest.raises(UserError, match=r"3\.bias of float32 \[7\], expected float32 \[6\]"):
        lpips.fill(network, layers, "here")
    layers["3.bias"] = torch.full((6,), torch.nan)
    with pytest.raises(UserError, match=r"NaN or infinite numbers in 3\.bias"):
        lpips.fill(network, layers, "here")


def test_what_was_not_computed_says_why(scene, monkeypatch):
    """Never silently skipped: a None in the table has its reason in the protocol."""
    monkeypatch.delenv(lpips.WEIGHTS_VARIABLE, raising=False)
    model = ElasticModel(random_splats(50), Transform(), Config(transform=cfg.TransformConfig("none")))
    measured = evaluate(model, scene, EvaluationConfig((0.5,)), (0.0, 0.0, 0.0))
    for net in ("vgg", "alex"):
        said, value = measured["protocol"][f"lpips_{net}"], measured["ratios"]["0.5"][f"lpips_{net}"]
        assert said.startswith("not computed, because") if value is None else said == "inputs in [-1, 1]"
