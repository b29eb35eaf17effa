"""Write docs/configuration.md, every setting of a run, from the dataclasses of flexgs/config.py.

    python docs/configuration.py
"""

import ast
import dataclasses
import inspect
import itertools
import typing
from pathlib import Path
from typing import Any

from flexgs import config
from flexgs.inputs import limits
from flexgs.old_names import SETTINGS

HEAD = """# Every setting

    flexgs train CAPTURE --steps 7000 --base.max-splats 100000
    flexgs train CAPTURE --config settings.json        # {"steps": 7000, "base": {"max_splats": 100000}}

This page is written by `python docs/configuration.py` from `flexgs/config.py`. Defaults are those without a
preset; `flexgs train --help` shows those of a preset, and [method.md](method.md) lists what each preset sets.
A flag that is true or false is switched off by `no-` before its last word: `--data.no-masks`.
"""


def page() -> str:
    """The text of docs/configuration.md."""
    groups = {f.name: f.default_factory for f in dataclasses.fields(config.Config)
              if f.default_factory is not dataclasses.MISSING}
    return "\n".join([HEAD, *_table("Of the whole run", config.Config, ""),
                      *(line for name, kind in groups.items()
                        for line in _table(f"`--{name}`", typing.cast(type, kind), f"{name}.")),
                      "## Old names", "", "Old flags, config files and runs go on working.", "",
                      "| before | today |", "|---|---|",
                      *(f"| `{old}` | `{new}` |" for old, new in SETTINGS.items()), ""])


def _table(title: str, group: type, prefix: str) -> list[str]:
    """The settings of one dataclass: a heading, its docstring, a row each."""
    kinds, words = typing.get_type_hints(group, include_extras=True), _docstrings(group)
    values = group()
    rows = [(f"`--{prefix}{name.replace('_', '-')}`", f"`{_shown(getattr(values, name))}`", _expected(kind),
             words.get(name, "")) for name, kind in kinds.items() if not dataclasses.is_dataclass(kind)]
    return [f"## {title}", "", inspect.cleandoc(group.__doc__ or ""), "",
            "| flag | default | expected | what it is |", "|---|---|---|---|",
            *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows), ""]


def _docstrings(group: type) -> dict[str, str]:
    """The text below each field of a dataclass, in one line."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(group)).body[0]).body
    return {field.target.id: " ".join(text.value.value.split())
            for field, text in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)}


def _shown(value: Any) -> str:
    """A value as it is typed behind its flag."""
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _expected(kind: Any) -> str:
    """The values that a setting takes, in words."""
    if words := limits(kind):
        return words
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, args))
    if args:
        return next(filter(None, map(_expected, args)), "")
    return {bool: "true, false", str: "text"}.get(kind, "")


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
