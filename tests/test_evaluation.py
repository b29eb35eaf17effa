"""Evaluation of a masked scene on a coloured background, recomputed with numpy; and which views it uses for
what."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from tiny import tiny_config, tiny_scene, tiny_splats

from flexgs import evaluate as metrics
from flexgs import formats
from flexgs.config import EvaluationConfig
from flexgs.errors import UserError
from flexgs.evaluate import chosen, evaluate
from flexgs.image import lpips
from flexgs.model.elastic import ElasticModel
from flexgs.model.transform import Transform
from flexgs.ply import write_ply
from flexgs.raster.reference import render_reference, to_float64
from flexgs.report.table import mean_ratios, psnr_auc

WHITE = (1.0, 1.0, 1.0)


def model() -> ElasticModel:
    splats = tiny_splats(40)
    splats.sh0 *= 3  # colours beyond 1, which are clamped
    return ElasticModel(splats, Transform(), tiny_config("plain"))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    g = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    window, values = np.outer(g, g) / g.sum() ** 2, []
    for x, y in zip(a.transpose(2, 0, 1), b.transpose(2, 0, 1), strict=True):
        x, y = (np.pad(t, 5, mode="reflect") for t in (x, y))
        mx, my, xx, yy, xy = (convolve2d(t, window, mode="valid") for t in (x, y, x * x, y * y, x * y))
        values.append((2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
                      / ((mx**2 + my**2 + 1e-4) * (xx - mx**2 + yy - my**2 + 9e-4)))
    return float(np.mean(values))


def by_hand(splats, views, background) -> tuple[float, float, float]:
    """PSNR, SSIM, and how much of the images is beyond 1."""
    psnrs, ssims, beyond = [], [], 0.0
    for view in views:
        image = render_reference(to_float64(splats), view.camera,
                                 background=torch.tensor(background).double()).image
        image, target = image.detach().numpy(), view.image().numpy() / 255
        beyond += float((image > 1.05).mean())
        image = image.clip(0, 1)
        if view.mask() is not None:
            image = np.where(view.mask().numpy()[..., None], image, target)
        psnrs.append(10 * np.log10(1 / np.mean((image - target) ** 2)))
        ssims.append(ssim(image, target))
    return float(np.mean(psnrs)), float(np.mean(ssims)), beyond


@pytest.mark.parametrize("background", [WHITE, (0.1, 0.8, 0.3)])
def test_a_masked_scene_on_a_background(background, tmp_path):
    scene, whole = tiny_scene(test=4), model()
    measured = evaluate(whole, scene, EvaluationConfig((0.26, 1.0), lpips=()), background)
    assert measured["protocol"]["background"] == list(background)
    for name, kept in (("0.26", 10), ("1", 40)):
        row = measured["ratios"][name]
        psnr, similarity, beyond = by_hand(whole.splats[:kept], scene.test, background)
        assert beyond > 0  # else the clamp would not show
        assert (row["psnr"] == pytest.approx(psnr, abs=2e-3)
                and row["ssim"] == pytest.approx(similarity, abs=2e-4))
        assert row["splats"] == kept
        write_ply(whole.splats[:kept], tmp_path / name)
        assert row["mb"] == round((tmp_path / name).stat().st_size / 1e6, 4)
        assert row["lpips_vgg"] is None and row["ms"] > 0 and row["cut_seconds"] >= 0


@pytest.mark.parametrize(("which", "chosen"),
                         [("all", [0, 1, 2, 3, 4]), ("even", [0, 2, 4]), ("odd", [1, 3])])
def test_which_test_views(which, chosen):
    scene, whole = tiny_scene(test=5), model()
    measured = evaluate(whole, scene, EvaluationConfig((1.0,), views=which, lpips=()), WHITE)
    assert (measured["protocol"]["test_views"] == len(chosen)
            and measured["protocol"]["of_the_test_views"] == which)
    assert measured["ratios"]["1"]["psnr"] == pytest.approx(
        by_hand(whole.splats, [scene.test[i] for i in chosen], WHITE)[0], abs=2e-3)


def test_encoders_see_training_views_only(monkeypatch):
    given = []

    def watched(cut, name, views):
        given.append([view.name for view in views])
        return formats.as_stored(cut, name, views)

    monkeypatch.setattr(metrics, "as_stored", watched)
    scene = tiny_scene()
    evaluate(model(), scene, EvaluationConfig((0.5,), lpips=()), WHITE)
    assert given == [[view.name for view in scene.train]]


@pytest.mark.parametrize(("inputs", "expected"), [("[-1, 1]", True), ("[0, 1]", False)])
def test_the_range_that_lpips_is_given(inputs, expected):
    """The network of lpips takes [-1, 1], or with normalize=True [0, 1], which it maps to that."""
    seen = []

    class Network(torch.nn.Module):
        def forward(self, a, b, normalize):
            seen.append((a.shape, normalize))
            return torch.tensor(0.25)

    measure = lpips.Lpips(Network(), inputs)
    assert measure(torch.rand(32, 40, 3), torch.rand(32, 40, 3)) == 0.25
    assert seen == [((1, 3, 32, 40), expected)]


def test_images_that_are_too_small_have_no_lpips(monkeypatch):
    monkeypatch.setattr(lpips, "load", lambda *_: pytest.fail("its backbone takes no such images"))
    measured = evaluate(model(), tiny_scene(), EvaluationConfig((1.0,)), WHITE)
    assert measured["protocol"]["ssim"].startswith("torchmetrics")
    assert "needs images of 32 pixels, found 12" in measured["protocol"]["lpips_vgg"]


def test_images_that_ssim_cannot_reflect_are_refused():
    """Before the training, as check_before asks for the chosen views."""
    views = tiny_scene().test
    small = [dataclasses.replace(v, camera=v.camera.scaled(9, 5)) for v in views]
    assert chosen(views, "all") == views
    with pytest.raises(UserError, match="found 5 pixels across or down, expected at least 6"):
        chosen(small, "all")


def test_the_area_under_psnr_is_over_log_ratio():
    """From 1 to 10 % 20 to 24 dB, from 10 to 100 % 24 to 30: (22 + 27) / 2."""
    rows = {"1": {"psnr": 30.0}, "0.01": {"psnr": 20.0}, "0.1": {"psnr": 24.0}}
    assert psnr_auc(rows) == pytest.approx((22 + 27) / 2)
    assert psnr_auc({"0.1": {"psnr": 24.0}}) == 24
    assert mean_ratios([{"ratios": rows}, {"ratios": {"0.1": {"psnr": 20.0}}}]) == {"0.1": {"psnr": 22.0}}


def test_results_are_json():
    measured = evaluate(model(), tiny_scene(), EvaluationConfig((0.5,), lpips=()), WHITE)
    assert json.loads(json.dumps(measured)) == measured
