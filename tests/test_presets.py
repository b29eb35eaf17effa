"""The values of every preset are those of docs/method.md: the document is the source, the code has to
follow."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from flexgs.config import PRESETS, Config

TEXT = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
PARTS = ("base", "lr", "loss", "ratios", "order", "gsnet", "transform", "deltas", "field")


def rows(section: str, columns: int) -> list[list[str]]:
    """The cells of the tables below a heading, those with so many columns."""
    text = TEXT.split(f"## {section}\n")[1].split("\n## ")[0].replace("\\|", "¦")
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("|")]
    return [row for row in found if len(row) == columns and not set(row[0]) <= {"-"}][1:]


def value(text: str) -> Any:
    if found := re.fullmatch(r"(\d+)/(\d+)", text):
        return int(found[1]) / int(found[2])
    return ast.literal_eval(text)


def settings(cell: str) -> dict[str, Any]:
    """Of words such as `base.stage1_fraction=15/35`."""
    return {name: value(text) for name, text in re.findall(r"`([\w.]+)=([^`]*)`", cell)}


def flat(config: Config) -> dict[str, Any]:
    """The settings by their names on the command line, tuples of tuples included."""
    return {f"{part}.{name}" if name else part: v for part, values in config.to_dict().items()
            for name, v in (values.items() if isinstance(values, dict) else [("", values)])}


def documented() -> dict[str, dict[str, Any]]:
    """All settings of each preset, as the document has them."""
    usual: dict[str, Any] = {}
    for part, cell in rows("What a preset sets", 2):
        prefix = "" if part == "run" else part.split(",")[0] + "."
        usual |= {prefix + name: v for name, v in settings(cell).items()}
    found: dict[str, dict[str, Any]] = {"": usual}
    for preset, start, cell in rows("What a preset sets", 3):
        found[preset.strip("`")] = found[start.strip("`")] | settings(cell)
    return found


def test_settings_without_a_preset_are_the_documented_ones():
    ours = {name: v for name, v in flat(Config()).items()
            if name.split(".")[0] in PARTS or name in ("steps", "batch", "seed", "background", "average")}
    assert ours == documented()[""]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_is_documented_and_nothing_else(name):
    expected = flat(Config()) | documented()[name] | {"preset": name}
    assert flat(Config.from_preset(name)) == expected


def test_every_preset_is_documented():
    assert set(documented()) == {"", *PRESETS}


def numbers(text: str) -> list[float]:
    return [float(x) * (1000 if unit else 1) for x, unit in re.findall(r"(\d*\.?\d+(?:e-\d+)?)(k?)", text)]


def test_the_table_of_disagreements_says_the_same_in_words():
    """Its cells are sentences; what numbers they have are those of the presets."""
    table = {int(row[0]): row[1:] for row in rows("Where they disagree", 7)}
    paper, official = Config.from_preset("paper"), Config.from_preset("official")
    code, ours, theirs = ({n: row[column] for n, row in table.items()} for column in (2, 3, 4))
    assert "two of 64" in ours[1] and paper.gsnet.shape == "paper"
    assert "four of 32" in theirs[1] and official.gsnet.shape == "code"
    assert "α·T" in ours[6] and paper.order.score == "alpha_t"
    assert "o·T" in theirs[6] and official.order.score == "opacity_t"
    for config, cells in ((paper, ours), (official, theirs)):
        assert numbers(code[7]) == [config.gsnet.gi_weight, config.gsnet.sparsity_weight]
        # "L1", both; "1-SSIM", of the elastic one and of the whole
        _, full, elastic, _, s_elastic, s_full = numbers(code[9])
        assert config.loss.full_l1 == full and config.loss.elastic_l1 == elastic
        assert (config.loss.elastic_ssim, config.loss.full_ssim) == (s_elastic, s_full)
        assert numbers(cells[10]) == [config.base.l1]
        assert numbers(cells[11]) == [config.base_steps, config.steps - config.base_steps]
        assert numbers(cells[13]) == [config.field.resolution[3]]
        assert numbers(code[14]) == [*config.field.levels, config.field.channels]
        assert numbers(code[15]) == [config.field.ratio_smoothness, config.field.ratio_l1,
                                     config.field.space_smoothness]
        assert config.field.smooth_both == ("both" in cells[16])
        assert config.field.zero_init == (cells[19] == "no change")
        assert config.lr.restart == (cells[23] == "forgotten")
        assert config.gsnet.detach == ("detached" in cells[31]) == config.gsnet.normalise
    assert (numbers(table[12][1]) == [*paper.ratios.values]
            and numbers(table[12][2]) == [*official.ratios.values])
