"""The table at the end of a run."""

import io

import pytest
from rich.console import Console

from flexgs.report.table import mean_ratios, print_results


def result(scene: str, psnr: float, lpips: float | None = None) -> dict:
    row = {"psnr": psnr, "ssim": 0.5, "lpips_vgg": lpips, "lpips_alex": None, "splats": 1_234_567, "mb": 20.5,
           "ms": 3.25}
    return {"scene": scene, "preset": "default", "ratios": {"1": row, "0.005": {**row, "psnr": psnr - 10}}}


def text(*results: dict) -> str:
    out = io.StringIO()
    print_results(results, Console(file=out, width=120))
    return out.getvalue()


def test_rows_rise_with_the_ratio_and_means_follow():
    lines = [line.split() for line in text(result("fox", 30), result("bicycle", 20)).splitlines()
             if "%" in line]
    assert lines[0][:4] == ["fox", "0.5", "%", "20.00"] and lines[1][:3] == ["100", "%", "30.00"]
    assert lines[2][0] == "bicycle"
    assert lines[4][:4] == ["mean", "0.5", "%", "15.00"] and "1,234,567" in lines[5]


def test_columns_without_values_are_left_out():
    assert "LPIPS" not in text(result("fox", 30))
    assert ("LPIPS vgg" in text(result("fox", 30, lpips=0.1))
            and "LPIPS alex" not in text(result("fox", 30, lpips=0.1)))
    assert "mean" not in text(result("fox", 30))


def test_means_are_over_what_all_scenes_have():
    other = result("b", 20, lpips=0.2)
    del other["ratios"]["0.005"]
    means = mean_ratios([result("a", 30), other])
    assert set(means) == {"1"} and means["1"]["psnr"] == pytest.approx(25)
    assert "lpips_vgg" not in means["1"]
