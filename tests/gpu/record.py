"""A study and what it leaves behind: its rows, written as they are measured, so that the same command goes on
after them."""

import dataclasses
import json
import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch

from flexgs.commands.doctor import installed, said
from flexgs.device import clock, pick_device
from flexgs.errors import MissingDependencyError, UserError
from flexgs.files import atomic_file, make_folder, write_json
from flexgs.run import git_sha

Row = dict[str, Any]
Part = tuple[str, Callable[[], Iterable[Row]]]
"""What is measured at once: a name, and what returns its rows."""


class OutOfTimeError(Exception):
    """A part has stopped itself; its own files let it go on."""


@dataclass
class Study(ABC):
    """The options that all studies share, and where their rows go: OUTPUT/<study>.json and .md."""

    tiny: bool = False
    """In seconds, on the CPU too: shows that the study works, and nothing else."""
    minutes: float = 9.0
    """Begin nothing that would not be over by then. The same command goes on with what is missing."""
    output: Path = Path("runs/gpu")

    TINY: ClassVar[Row] = {}
    """The defaults under --tiny."""

    @abstractmethod
    def parts(self) -> Iterable[Part]:
        """In the order in which they are measured."""

    def run(self) -> int:
        """Measure what is missing, write, print the table; 1 if a row does not pass, else 0."""
        self.began = time.monotonic()
        if not self.tiny and not torch.cuda.is_available():
            raise UserError("found no CUDA device; expected one, or --tiny, which runs on the CPU "
                            "too and proves nothing")
        if torch.cuda.is_available() and not installed("gsplat"):
            raise MissingDependencyError("gsplat", "cuda", "rendering on a CUDA device")
        for f in dataclasses.fields(self):
            if self.tiny and f.name in self.TINY and getattr(self, f.name) == f.default:
                setattr(self, f.name, self.TINY[f.name])
        self.device = pick_device("auto")
        name = type(self).__name__.lower()
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                    if f.name not in ("minutes", "output")}
        about = {"study": name, **hardware(self.device), "git_sha": git_sha(),
                 "settings": json.loads(json.dumps(settings, default=str))}
        self.rows = kept(self.output / f"{name}.json", about)
        parts, longest = dict(self.parts()), 0.0
        for part, measure in parts.items():
            if part in self.rows or self.left <= longest:
                continue
            start = time.monotonic()
            try:
                self.rows[part] = list(measure())
            except torch.OutOfMemoryError:
                self.rows[part] = [{"remark": "out of GPU memory"}]
            except OutOfTimeError:
                continue
            seconds = time.monotonic() - start
            longest = 0.0 if self.stops_itself else max(longest, seconds)
            print(f"{name}: {part}: {seconds:.0f} s", file=sys.stderr, flush=True)
            self.write(about, parts)
        print(self.write(about, parts))
        return int(any(row.get("pass") is False for rows in self.rows.values() for row in rows))

    stops_itself: ClassVar[bool] = False
    """Whether a part raises OutOfTimeError when the minutes are over, so that any may begin."""

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.began)

    def write(self, about: Row, parts: Iterable[str]) -> str:
        """Write what is there and what is missing; returns it as Markdown."""
        name, date = about["study"], datetime.now(UTC).isoformat(timespec="seconds")
        missing = [part for part in parts if part not in self.rows]
        rows = [{"case": part, **row} for part in parts for row in self.rows.get(part, [])]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [f"{name}: {about['device']}, driver {about['driver']}, torch {about['torch']}, "
                 f"CUDA {about['cuda']}, gsplat {about['gsplat']}, commit {about['git_sha']}, {date}"]
        if rows:
            lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|",
                      *("| " + " | ".join(text(row.get(column)) for column in columns) + " |"
                        for row in rows)]
        if missing:
            lines += ["", f"Missing, out of time; the same command goes on: {'; '.join(missing)}"]
        page = "\n".join(lines) + "\n"
        write_json(make_folder(self.output) / f"{name}.json",
                   {**about, "date": date, "missing": missing, "rows": rows})
        with atomic_file(self.output / f"{name}.md") as out:
            out.write_text(page)
        return page


def hardware(device: str) -> Row:
    """What the figures depend on, besides the code."""
    name, driver = f"CPU ({platform.machine()})", None
    if device != "cpu":
        name = torch.cuda.get_device_name()
        driver = said(["nvidia-smi", "--query-gpu=driver_version",
                       "--format=csv,noheader"]).partition("\n")[0] or None
    return {"device": name, "driver": driver, "torch": torch.__version__, "cuda": torch.version.cuda,
            "gsplat": installed("gsplat"), "python": platform.python_version()}


def kept(path: Path, about: Row) -> dict[str, list[Row]]:
    """The rows of path by part, if they were measured with the same settings, on the same commit and
    hardware; else none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: not readable ({e}); remove it to measure again") from None
    if differing := [key for key, value in about.items() if found.get(key) != value]:
        print(f"{path}: was measured with another {', '.join(differing)}; everything is measured again",
              file=sys.stderr)
        return {}
    parts: dict[str, list[Row]] = {}
    for row in found["rows"]:
        parts.setdefault(row.pop("case"), []).append(row)
    return parts


def text(value: Any) -> str:
    """A cell of the table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def peak_memory(device: str) -> int:
    """Bytes: the most that tensors have taken on the GPU since the last call; on the CPU, the process
    ever."""
    if device == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    clock(torch.device(device))
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak
