"""What comes from outside is refused in one line before anything is made of it."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flexgs.errors import UserError
from flexgs.inputs import check_tensors, parse_json, read_json, regular_file, typed


@dataclass
class Thing:
    name: str
    numbers: tuple[float, ...]
    more: dict[str, list[int]] | None = None


@pytest.mark.parametrize("raw",
                         [b"\xff", b"{", b"[" * 100_000, b"[" * 40 + b"]" * 40, b"1" * 400, b"1e400", b"NaN",
                          b"-Infinity"])
def test_json_that_is_none_or_would_break_its_reader_is_one_line(raw: bytes):
    with pytest.raises(UserError, match=r"^x.json: .*damaged") as e:
        parse_json(raw, "x.json")
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 250


def test_json_with_a_byte_order_mark_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": 1.5}', "x.json") == {"a": 1.5}


@pytest.mark.parametrize("value", [
    [], {"name": "a"}, {"name": 1, "numbers": []}, {"name": "a", "numbers": [True]},
    {"name": "a", "numbers": 3}, {"name": "a", "numbers": [10**400]},
    {"name": "a", "numbers": [], "other": 1},
    {"name": "a", "numbers": [], "more": {"x": [1.5]}}])
def test_json_of_other_types_names_the_place(value: object):
    with pytest.raises(UserError, match=r"^x.json"):
        typed(Thing, value, "x.json")


def test_json_of_the_right_types_is_read():
    assert typed(Thing, {"name": "a", "numbers": [1, 2.5], "more": {"x": [1]}},
                 "x") == Thing("a", (1.0, 2.5), {"x": [1]})


def test_folders_devices_and_pipes_are_no_files(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "absent", Path("a\0b")):
        with pytest.raises(UserError):
            regular_file(path)
        with pytest.raises(UserError):
            read_json(path)


@pytest.mark.parametrize("change", [
    lambda t: t.pop("a"), lambda t: t.update(c=torch.zeros(2)), lambda t: t.update(b=torch.zeros(3)),
    lambda t: t.update(a=torch.zeros(2, 3, dtype=torch.float64)), lambda t: t.update(a=torch.zeros(2)),
    lambda t: t["a"].fill_(torch.nan), lambda t: t["b"].fill_(torch.inf)])
def test_tensors_of_another_name_shape_or_type_or_without_finite_numbers_are_refused(change):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    layout = {"a": ("float32", ("n", 3)), "b": ("float32", ("n",))}
    check_tensors(tensors, layout, "x.safetensors")
    change(tensors)
    with pytest.raises(UserError, match=r"^x.safetensors: found"):
        check_tensors(tensors, layout, "x.safetensors")
