"""How trainings go, for a person: a live bar in a terminal or notebook, elsewhere a line now and then."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from flexgs.callbacks import Callback
from flexgs.config import percent

if TYPE_CHECKING:
    from flexgs.model.elastic import ElasticModel
    from flexgs.training.trainer import Trainer

PLAIN_SECONDS = 10.0
"""Time after which a progress line is shown anew where the output is no terminal; it doubles each time."""
PLAIN_MOST = 60.0
"""The most that this time becomes."""


def progress(name: str, console: Console | None = None) -> "Bar | Lines":
    """Return a bar for a training of this name where it can be drawn, else lines."""
    console = console or Console()
    notebook = console.is_jupyter and find_spec("ipywidgets") is not None
    live = (console.is_terminal and not console.is_dumb_terminal) if not console.is_jupyter else notebook
    return Bar(name, console) if live else Lines(name)


def quality(metrics: Mapping[str, Any]) -> str:
    """Write the PSNR on test views: "test PSNR 1 % 20.31, 100 % 27.10 dB"; empty without any.

    It is that of all test views where config.eval_every had them measured, else of the few of metrics().
    """
    psnr = {key.removeprefix("test_psnr_"): value for key, value in metrics.items()
            if key.startswith("test_psnr_")}
    psnr = {ratio: row["psnr"] for ratio, row in metrics.get("ratios", {}).items()} or psnr
    return f"test PSNR {', '.join(f'{percent(e)} {dB:.2f}' for e, dB in psnr.items())} dB" if psnr else ""


def progress_line(name: str, step: int, m: Mapping[str, Any]) -> str:
    """Write the figures of Trainer.metrics as one line."""
    return (f"{name:14} stage {m['stage']}  {step:>6}/{m['steps']}  {m['views_per_second']:6.1f} views/s  "
            f"ETA {left(m['eta_seconds']):>6}  {m['splats']:>9,} Gaussians  {quality(m)}  "
            f"{m['memory_mb'] / 1000:.1f} GB")


def left(seconds: float) -> str:
    """Write the time that is left as minutes and seconds, ?:?? where it is not known."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02}" if math.isfinite(seconds) else "?:??"


class Lines(Callback):
    """Prints a line for each report."""

    def __init__(self, name: str):
        self.name = name

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Print the figures."""
        print(progress_line(self.name, step, metrics), flush=True)


class Bar(Callback):
    """Draws one live bar, with the figures of the last report below it, in colours unless NO_COLOR is set."""

    def __init__(self, name: str, console: Console):
        self.name, self.drawn = name, _Drawn(
            TextColumn("{task.description}"), BarColumn(bar_width=None), _Views(),
            _Left(),
            console=console, refresh_per_second=4, expand=True)
        self.task = self.drawn.add_task(name)
        self.stages = (0, 0)
        """The views at which stage 1 and stage 2 end."""

    def begin(self, trainer: "Trainer") -> None:
        """Draw the bar."""
        self.stages = (trainer.base_steps, trainer.config.steps)
        self.step(trainer.step)
        self.drawn.start()

    def step(self, step: int) -> None:
        """Move the bar; it is drawn four times a second."""
        first, last = self.stages
        self.drawn.update(self.task, completed=min(step, last), total=last,
                          description=f"{self.name} [cyan]stage {1 if step < first else 2}[/]")

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the figures."""
        self.drawn.update(self.task, ends=time.monotonic() + metrics["eta_seconds"])
        self.drawn.figures = (f"{metrics['splats']:,} Gaussians  {quality(metrics)}  "
                              f"{metrics['memory_mb'] / 1000:.1f} GB of memory")

    def trained(self, model: "ElasticModel") -> None:
        """Say that the cuts are being measured, as a run does now."""
        self.drawn.update(self.task, description=f"{self.name} [cyan]trained[/]")
        self.drawn.measuring = True

    def end(self) -> None:
        """Leave the bar as it is."""
        self.drawn.measuring = False
        self.drawn.stop()


class _Drawn(Progress):
    """A bar and two lines below it."""

    figures, measuring = "", False

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what is drawn, from the top."""
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(self.figures)
        if self.measuring:
            yield Text("writing and measuring the cuts ...", "cyan")


class _Left(ProgressColumn):
    """The time that is left, counted down from the estimate of the last report."""

    def render(self, task: Task) -> Text:
        return Text(left(max(task.fields.get("ends", math.nan) - time.monotonic(), 0.0)), "cyan")


class _Views(ProgressColumn):
    """Views so far, of how many, and per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{task.completed:,.0f}/{task.total:,.0f} views" + (f"  {speed:.1f}/s" if speed else ""))


class Screen:
    """Progress of the scenes: a block that is redrawn on a terminal, else lines, ever more seldom."""

    def __init__(self) -> None:
        self.console = Console(soft_wrap=True, highlight=False)
        self.live = (Live(console=self.console, auto_refresh=False, transient=True)
                     if self.console.is_terminal else None)
        self._shown: dict[str, tuple[float, float, str]] = {}

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def log(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False)

    def show(self, lines: dict[str, str], waiting: Sequence[str]) -> None:
        """Show the progress line of each scene that trains, and the names of those that wait."""
        if waiting:
            lines = lines | {"": f"{len(waiting)} waiting: {', '.join(waiting)}"}
        if self.live:
            self.live.update(Text("\n".join(lines.values()), no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        now = time.monotonic()
        for scene, line in lines.items():
            due, pause, last = self._shown.get(scene, (0.0, PLAIN_SECONDS, ""))
            if line != last and now >= due:
                self._shown[scene] = now + pause, min(2 * pause, PLAIN_MOST), line
                self.log(line)
