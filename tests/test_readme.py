"""The Python of the first guide runs, and what the README and the guides name exists."""

import re
from pathlib import Path
from runpy import run_path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
START = (ROOT / "docs" / "start.md").read_text()


def test_the_python_example_runs(capture, tmp_path, monkeypatch):
    example = re.search(r"```python\n(.*?)```", START, re.S)[1]
    shortened = (example.replace("captures/garden", str(capture)).replace("factor=4", "factor=1")
                 .replace('"default", steps=30_000', '"smoke", steps=40').replace("20MB", "20kB"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(shortened, names)
    assert names["image"].shape == (48, 64, 3)
    size = (tmp_path / "garden_20mb.ply").stat().st_size
    assert 15_000 < size <= 20_000


def test_the_files_that_it_names_exist():
    tree = re.search(r"```\n(flexgs/.*?)```", README, re.S)[1]
    named = set(re.findall(r"[a-z_0-9]+\.py", tree))
    there = {p.name for folder in ("flexgs", "ray_jobs", "tuning") for p in (ROOT / folder).rglob("*.py")}
    assert named <= there
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file()


def test_the_reference_of_settings_is_of_today():
    """`python docs/configuration.py` writes it; every setting says what it is."""
    found = run_path(str(ROOT / "docs" / "configuration.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == found
    assert not re.findall(r"^\| `--([^`]*)` .*\|  \|$", found, re.M)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "cluster" / "README.md"):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
