"""Comparisons as tables: means, spread, what is best, what is missing, in every form; and the published
figures."""

import csv
import io
import statistics

import pytest
from PIL import Image
from rich.console import Console

from flexgs.config import METHODS
from flexgs.errors import UserError
from flexgs.report.comparison import (
    CSV_HEADER,
    cost_sheet,
    mean_rows,
    published_sheet,
    quality_sheet,
    write_csv,
)
from flexgs.report.pictures import write_tradeoff
from flexgs.report.published import PUBLISHED_AS, SCENES, published
from flexgs.report.sheet import Sheet
from flexgs.report.table import print_table


def figures(psnr: float, ssim: float = 0.5, lpips: float | None = 0.25) -> dict:
    return {"psnr": psnr, "ssim": ssim, "lpips_vgg": lpips, "lpips_alex": None, "splats": 1234, "mb": 0.5,
            "ms": 2.0, "cut_seconds": 0.25}


def entry(seed: int, ratios: dict, **more) -> dict:
    return {"seed": seed, "ratios": ratios, "train_seconds": 100.0, "stored_mb": 6.0, **more}


ROWS = {
    "default": [entry(0, {"0.05": figures(25.0, 0.8, 0.2), "1": figures(31.0)}),
                entry(1, {"0.05": figures(26.0, 0.7, 0.3), "1": figures(31.0)})],
    "lightgs --order.score c3dgs": [entry(0, {"0.05": figures(25.499, 0.75, 0.21)})],
    "a_b*": [],
}


def texts(sheet: Sheet) -> list[list[str]]:
    return [[cell.text for cell in row] for row in sheet.rows]


def best(sheet: Sheet) -> set[tuple[str, int]]:
    return {(row[0].text, i) for row in sheet.rows for i, cell in enumerate(row) if cell.best}


def test_quality_is_the_mean_over_seeds_with_its_spread():
    sheet = quality_sheet(ROWS)
    assert sheet.headings[1:4] == (("5 %", "PSNR"), ("5 %", "SSIM"), ("5 %", "LPIPS"))
    spread = statistics.stdev([25.0, 26.0])
    assert texts(sheet) == [["default", f"25.50 ± {spread:.2f}", "0.750", "0.250", "31.00 ± 0.00", "0.500",
                             "0.250"],
                            ["lightgs --order.score c3dgs", "25.50", "0.750", "0.210", "", "", ""],
                            ["a_b*", "", "", "", "", "", ""]]
    assert "±" in sheet.title and "±" not in quality_sheet({"one": ROWS["default"][:1]}).title


def test_best_is_bold_by_what_is_printed_and_by_the_figures_direction():
    """25.4990 and 25.5 print alike: both are bold. LPIPS is better when lower."""
    assert best(quality_sheet(ROWS)) == {("default", 1), ("lightgs --order.score c3dgs", 1), ("default", 2),
                                         ("lightgs --order.score c3dgs", 2),
                                         ("lightgs --order.score c3dgs", 3), ("default", 4), ("default", 5),
                                         ("default", 6)}


def test_a_figure_that_nobody_has_has_no_column():
    rows = {"a": [entry(0, {"0.1": figures(20, lpips=None)})]}
    assert [heading for _, heading in quality_sheet(rows).headings] == ["method", "PSNR", "SSIM"]


def test_costs():
    sheet = cost_sheet(ROWS)
    assert [h for _, h in sheet.headings] == ["method", "kept", "Gaussians", "MB", "s to cut", "s to train",
                                              "MB stored", "seeds"]
    assert texts(sheet)[:3] == [["default", "5 %", "1,234", "0.50", "0.25", "100", "6.00", "2"],
                                ["", "100 %", "1,234", "0.50", "0.25", "", "", ""],
                                ["lightgs --order.score c3dgs", "5 %", "1,234", "0.50", "0.25", "100", "6.00",
                                 "1"]]


def test_all_forms_show_the_same_figures():
    for sheet in (quality_sheet(ROWS), cost_sheet(ROWS)):
        out = io.StringIO()
        print_table(sheet.rich(), Console(file=out))
        cells = [text for row in texts(sheet) for text in row if text and not text.startswith("a_b")]
        latex = sheet.latex().replace(r"$\pm$", "±").replace(r"\%", "%").replace("{-}", "-")
        for text in cells:
            assert text in out.getvalue() and text in sheet.markdown() and text in latex, text
        assert sheet.markdown().count(r"a\_b\*") == 1 and r"a\_b{*}" in sheet.latex()


def test_latex_rows_have_a_cell_for_every_column():
    sheet = quality_sheet(ROWS)
    lines = [line for line in sheet.latex().splitlines() if line.endswith(r"\\")]
    groups, *others = lines
    assert groups.count(r"\multicolumn{3}{c}") == 2 and groups.count("&") == 2
    assert {line.count("&") for line in others} == {len(sheet.headings) - 1}
    assert sheet.latex().count(r"\textbf{") == len(best(sheet))


def test_csv_holds_every_figure_unrounded(tmp_path):
    write_csv(ROWS, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == CSV_HEADER
    assert [(r["method"], r["seed"], r["ratio"], float(r["psnr"])) for r in lines] == [
        ("default", "0", "0.05", 25.0), ("default", "0", "1", 31.0), ("default", "1", "0.05", 26.0),
        ("default", "1", "1", 31.0),
        ("lightgs --order.score c3dgs", "0", "0.05", 25.499)]
    assert lines[0]["lpips_alex"] == "" and lines[0]["cut_seconds"] == "0.25"


def test_means_over_scenes_are_of_the_methods_that_all_have():
    other = {"default": [entry(0, {"0.05": figures(20.0), "0.5": figures(1.0)})], "more": []}
    means = mean_rows([ROWS, other])
    assert set(means) == {"default"} and set(means["default"][0]["ratios"]) == {"0.05"}
    assert means["default"][0]["ratios"]["0.05"]["psnr"] == pytest.approx((25.5 + 20.0) / 2)


def test_tradeoff_is_a_picture_with_a_line_per_method(tmp_path):
    for name, rows in {"some": ROWS, "none": {}}.items():
        write_tradeoff(rows, tmp_path / f"{name}.png")
    some, none = (Image.open(tmp_path / f"{name}.png") for name in ("some", "none"))
    assert some.size[0] > 800 and some.tobytes() != none.tobytes()


# ---------------------------------------------------------------------- what the paper reports


def test_published_tables_are_complete():
    rows = [(method, ratio) for scene in SCENES for method,
            (e,) in published(scene).items() for ratio in e["ratios"]]
    assert len(rows) == 8 * 5 * 4 and {method for method, _ in rows} == set(PUBLISHED_AS.values())
    # which the paper does not have
    beyond = {"quality", "lightgs+", "decimate", "decimate-ft", "matryoshka", "scratch", "mcmc", "gns"}
    assert set(PUBLISHED_AS) >= set(METHODS) - beyond
    with pytest.raises(UserError, match="garden: no published figures; expected one of bicycle"):
        published("garden")


@pytest.mark.parametrize(("scene", "method", "ratio", "psnr", "ssim", "lpips"), [
    ("bicycle", "EAGLES", "0.15", 23.530, 0.6300, 0.3600),
    ("bonsai", "LightGS*", "0.01", 15.231, 0.4839, 0.5181),
    ("counter", "FlexGS", "0.1", 27.577, 0.8807, 0.1733),
    ("flowers", "C3DGS", "0.05", 19.570, 0.4530, 0.4790),
    ("train", "LightGS", "0.15", 22.835, 0.8655, 0.1298), ("truck", "FlexGS", "0.05", 25.374, 0.9062, 0.0934),
    ("berlin", "C3DGS", "0.01", 20.243, 0.7351, 0.4679), ("london", "FlexGS", "0.01", 21.29, 0.6697, 0.5234)])
def test_published_figures(scene, method, ratio, psnr, ssim, lpips):
    """One of each of the supplementary's Tables 1 to 8, read off by eye."""
    (e,) = published(scene)[method]
    assert e["ratios"][ratio] == {"psnr": psnr, "ssim": ssim, "lpips_vgg": lpips}


def test_published_means_over_four_scenes():
    """As computed by hand from the same tables."""
    means = mean_rows([published(scene) for scene in ("bicycle", "bonsai", "counter", "flowers")])
    for method, expected in {"FlexGS": (22.134, 25.019, 26.087, 26.541),
                             "LightGS": (21.260, 24.075, 25.437, 26.239)}.items():
        found = [row["psnr"] for row in means[method][0]["ratios"].values()]
        assert found == pytest.approx(expected, abs=1e-3)


def test_measured_beside_published():
    rows = {"lightgs": [entry(0, {"0.05": figures(24.0, 0.6, 0.4)}),
                        entry(1, {"0.05": figures(25.0, 0.6, 0.4)})],
            "default --seed 3": [entry(0, {"0.5": figures(30.0)})],
            "scratch": [entry(0, {"0.05": figures(20.0)})]}
    assert texts(published_sheet(rows, published("bicycle"))) == [
        ["lightgs", "reproduced", "24.50", "0.600", "0.400"],
        ["", "published (LightGS)", "23.22", "0.595", "0.399"],
        ["", "difference", "+1.28", "+0.005", "+0.001"]]
