"""The command line: flexgs train | adapt | compare | eval | bench | doctor, and those of commands/."""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro

from flexgs import telemetry
from flexgs.commands.data import Data
from flexgs.commands.deploy import Cut, FrameSize, Info, Pack, Render, Serve, View
from flexgs.config import METHODS, PRESETS, Config, Distributed, Evaluation
from flexgs.errors import UserError, cure, one_line, pasted
from flexgs.files import make_folder, only_one
from flexgs.inputs import Range, limits, typed
from flexgs.signals import Terminated, listen
from flexgs.sizes import fitting
from flexgs.urls import first_line, public

if TYPE_CHECKING:
    from flexgs.scene import Scene

T = TypeVar("T")
AnyConfig = Annotated[Config, tyro.conf.arg(name="")]  # its settings are flags of their own: --steps, --field.resolution

ConfigFile = Annotated[Path | None, tyro.conf.arg(name="config")]
Typed = tyro.conf.Suppress[frozenset[str]]
"""The flags that the user has typed, which parse() fills in: what is chosen wins over what suits the machine."""


@dataclass
class Train:
    """Train one scene on this machine, without Ray; the same command continues an unfinished run."""

    scene: tyro.conf.Positional[Path]
    """Folder of the capture (COLMAP or transforms.json)."""
    output: Path = Path("runs/flexgs")
    """The run goes to OUTPUT/<scene>."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    config_file: ConfigFile = None
    """A config.json to start from instead of a preset."""
    config: AnyConfig = field(default_factory=Config)
    typed: Typed = frozenset()

    def __call__(self) -> None:
        from flexgs.device import pick_device
        from flexgs.distributed import Group
        from flexgs.model.elastic import ElasticModel
        from flexgs.report.table import print_results
        from flexgs.run import LocalSession, finished, run
        from flexgs.training.memory import expected_memory

        device = pick_device(self.device)
        self.config = fitting(self.config.check(), device != "cpu", self.typed)
        scene = load_capture(self.scene, self.config)
        print(scene.summary(), flush=True)
        folder = self.output / scene.name
        with only_one(folder):
            results = finished(folder, self.config, scene)
            if results:
                ElasticModel.load(folder)  # or a line says that it is not whole
                print(f"{pasted(folder)}: already finished at {results['steps']} views; raise --steps to go on")
            else:
                print(f"{scene.name}: {expected_memory(scene, self.config)}", flush=True)
                session = LocalSession(folder, Group(), functools.partial(_print_progress, scene.name))
                results = run(self.config, scene, folder, Group(), session, device)
        print_results([results])
        print(where_to_go(folder))


@dataclass
class Adapt(Train):
    """Make the Gaussians of any 3DGS PLY elastic, given their capture; the whole model stays as it is, bit for bit."""

    ply: Annotated[Path, tyro.conf.arg(aliases=["-i"])] = field(kw_only=True)
    """The PLY, in the coordinates of the capture."""
    output: Path = Path("runs/adapted")
    """The run goes to OUTPUT/<scene>."""

    def __call__(self) -> None:
        self.config.base.ply = str(self.ply)
        super().__call__()


@dataclass
class Compare:
    """Methods side by side on one capture: the same stage 1, the same counts, the same steps; or the paper's own table."""

    scene: tyro.conf.Positional[Path | None] = None
    """Folder of the capture (COLMAP or transforms.json)."""
    methods: tuple[str, ...] = METHODS
    """Presets, each with settings of its own in quotes: "default --deltas.knots 0.01 0.1"."""
    ratios: tuple[float, ...] = ()
    """Shares of the Gaussians to compare at; default: --evaluation.ratios."""
    seeds: tuple[int, ...] = ()
    """Several give means and spread; default: --seed."""
    published: str | None = None
    """The scene of the paper whose published figures are printed: beside the measured ones, or alone without a capture.
    Default: that of the capture's name, if there is one."""
    output: Path = Path("runs/compare")
    """Everything goes to OUTPUT/<scene>."""
    mlflow_uri: str | None = None
    """Default: $MLFLOW_TRACKING_URI, else OUTPUT/mlflow.db."""
    device: str = "auto"
    config_file: ConfigFile = None
    """A config.json to start from instead of a preset."""
    config: AnyConfig = field(default_factory=Config)
    typed: Typed = frozenset()

    def __call__(self) -> None:
        from flexgs import compare
        from flexgs.device import pick_device
        from flexgs.report.comparison import quality_sheet
        from flexgs.report.published import SCENES, published
        from flexgs.report.table import print_table
        from flexgs.tracking import Tracking, sqlite_uri

        if self.scene is None:
            if self.published is None:
                raise UserError("compare: found no capture; expected its folder, or --published and a scene of the paper")
            title = f"{self.published}, as published (FlexGS, CVPR 2025, supplementary)"
            print_table(quality_sheet(published(self.published), title, more_digits=1).rich())
            return
        self.config.evaluation.ratios = self.ratios or self.config.evaluation.ratios
        device = pick_device(self.device)
        self.config = fitting(self.config.check(), device != "cpu", self.typed)
        scene = load_capture(self.scene, self.config)
        print(scene.summary(), flush=True)
        name = self.published or (scene.name if scene.name in SCENES else None)
        beside = published(name) if name else None
        folder = make_folder(self.output / scene.name)
        commons = compare.seeded(self.config, self.seeds)
        cells = [cell for common in commons for cell in compare.cells(self.methods, common, folder)]
        with only_one(folder):
            for common in commons:
                compare.train_stage1(scene, common, folder, device, functools.partial(_print_progress, f"{scene.name} stage 1"))
            for cell in cells:
                compare.train_cell(cell, scene, device, functools.partial(_print_progress, cell.folder.name))
            rows = compare.measured(cells)
            for sheet in compare.write(scene.name, rows, beside, self.config, folder):
                print_table(sheet.rich())
        print(compare.legend(rows))
        uri = self.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(self.output / "mlflow.db")
        tracking = Tracking(uri, "flexgs-compare", self.output / "mlartifacts")
        page = compare.track(scene.name, rows, self.config, folder, tracking)
        print(f"tables and figure: {pasted(folder)}\nMLflow: {page}")


@dataclass
class Eval:
    """Measure a trained model at any ratios on the test views of its capture."""

    run: tyro.conf.Positional[Path]
    """Run folder, or its model folder."""
    scene: Path | None = None
    """Folder of the capture. Default: where the run found it."""
    evaluation: Annotated[Evaluation, tyro.conf.arg(name="")] = field(default_factory=Evaluation)
    device: str = "auto"
    json: bool = False
    """Print JSON instead of a table."""

    def __call__(self) -> None:
        from flexgs.device import pick_device
        from flexgs.evaluate import evaluate
        from flexgs.model.elastic import ElasticModel
        from flexgs.report.table import print_results
        from flexgs.run import recorded_capture
        from flexgs.scene.identity import GIVE_SCENE, check_same_capture

        self.evaluation.check()
        model = ElasticModel.load(self.run).to(pick_device(self.device))
        scene = load_capture(self.scene or recorded_capture(self.run), model.config)
        check_same_capture(model.capture, scene.digest, self.run, GIVE_SCENE)
        measured = evaluate(model, scene, self.evaluation, model.config.background)
        if self.json:
            print(json.dumps(measured, indent=1))
        else:
            print_results([{"scene": scene.name, "preset": model.config.preset, **measured}])


@dataclass
class Bench:
    """Time the rasterizer, frames of a model, the steps of stage 2, or what more workers gain, on this machine."""

    what: tyro.conf.Positional[Literal["raster", "frame", "step", "ddp"]] = "raster"
    run: str | None = None
    """frame: run folder, .fgs file or file of splats."""
    size: FrameSize = (1280, 720)
    """frame: width and height."""
    save: Path | None = None
    """frame: a .json for `flexgs cut --budget 16ms --profile`."""
    points: Path | None = None
    """raster: an .npz of real points to place the Gaussians at; default: random ones."""
    scene: Path | None = None
    """step: folder of the capture that ..."""
    checkpoint: Path | None = None
    """... this checkpoint of stage 1 belongs to: stage1/done of a comparison."""
    methods: tuple[str, ...] = ("default", "fast", "paper", "official", "mended")
    """step: what to time, as in compare."""
    workers: Annotated[tuple[Annotated[int, Range(1, 256)], ...], Range(1, 16)] = (1, 2, 4)
    """ddp: numbers of worker processes, of one thread each."""
    splats: Annotated[int, Range(1, 10**8)] = 20_000
    """ddp: Gaussians, seen in images of 320x240."""
    rounds: Annotated[int, Range(1, 10**6)] = 15
    """ddp: how often each number of workers takes its turn; medians are printed."""
    step_ms: Annotated[float, Range(0, 1e9, "(]")] | None = None
    """ddp: what a step takes on one GPU of yours, to predict the speed-up of many; default: as on one thread here."""
    gpu_splats: Annotated[int, Range(1, 10**9)] = 3_000_000
    """ddp: the Gaussians that --step-ms is for."""
    distributed: Distributed = field(default_factory=Distributed)

    def __call__(self) -> None:
        from flexgs.bench.ddp import bench_ddp
        from flexgs.bench.raster import bench_raster
        from flexgs.bench.step import bench_step
        from flexgs.deploy.frame_time import measure_frames
        from flexgs.deploy.source import open_model
        from flexgs.device import pick_device
        from flexgs.training.checkpoint import Checkpoint

        if self.what == "raster":
            bench_raster(points=self.points)
            return
        if self.what == "frame":
            if not self.run:
                raise UserError("bench frame: expected --run and a model")
            profile = measure_frames(open_model(self.run), self.size, pick_device("auto"))
            print(profile)
            if self.save:
                profile.save(self.save)
            return
        if self.what == "ddp":
            bench_ddp(self.workers, count=self.splats, rounds=self.rounds, options=self.distributed, step_ms=self.step_ms,
                      gpu_count=self.gpu_splats)
            return
        if not self.scene or not self.checkpoint:
            raise UserError("bench step: expected --scene and --checkpoint; `flexgs compare SCENE` leaves one in stage1/done")
        bench_step(load_capture(self.scene, Checkpoint(self.checkpoint).config), self.checkpoint, self.methods)


@dataclass
class Doctor:
    """Say whether a training would work here, what with, and the cure of what is wrong; exit code 1 if something is."""

    storage: Path = Path("runs")
    """Where runs are to go."""
    data_root: Path | None = None
    """Folder of captures to look into."""
    mlflow_uri: str | None = None
    """Default: $MLFLOW_TRACKING_URI, else STORAGE/mlflow.db."""
    ray_address: str | None = None
    """host:port of a cluster. Default: $RAY_ADDRESS."""

    def __call__(self) -> int:
        from flexgs.commands.doctor import Places, examine

        return examine(Places(self.storage, self.data_root, self.mlflow_uri, self.ray_address))


COMMANDS: dict[str, type] = {"train": Train, "adapt": Adapt, "compare": Compare, "eval": Eval,
                             "cut": Cut, "pack": Pack, "serve": Serve, "view": View, "render": Render, "info": Info,
                             "data": Data, "bench": Bench, "doctor": Doctor}


def parse(command: type[T], args: Sequence[str], prog: str) -> T:
    """Fill command from args; its settings, if it has a field `config`, start from --config or --preset.

    UserError, in one line, for flags and values that it does not take; ranges of its settings are checked by Config.check.
    """
    start: Any = tyro.MISSING_NONPROP
    if "config" in (f.name for f in dataclasses.fields(command)):  # type: ignore[arg-type]
        file, preset = last_value("--config", args), last_value("--preset", args)
        if file is not None and preset is not None:
            raise UserError("--config and --preset: expected one of them; both are a set of settings to start from")
        config = Config.load(Path(file)) if file is not None else Config.from_preset("default" if preset is None else preset)
        given = {f.name: _default_of(f) for f in dataclasses.fields(command)}  # type: ignore[arg-type]
        start = command(**{**given, "config": config} | ({"typed": flags_in(args)} if "typed" in given else {}))
        return fill(command, args, prog, start, f"{command.__doc__}\n\nPresets:\n{presets()}")
    return fill(command, args, prog, start)


def presets() -> str:
    """A line for each preset: what it is."""
    return "\n".join(f"  {name:10} {' '.join((f.__doc__ or '').split())}" for name, f in PRESETS.items())


def fill(kind: type[T], args: Sequence[str], prog: str, start: Any = tyro.MISSING_NONPROP,
         description: str | None = None) -> T:
    """A dataclass from flags, on top of start. UserError, in one line, for flags and values that it does not take."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), READABLE:
            filled = tyro.cli(kind, args=list(args), prog=prog, description=description or kind.__doc__, default=start)
    except SystemExit as e:
        if not e.code:
            raise
        # tyro frames its complaint: a title, the complaint, a rule, advice; without UTF-8 there is a rule below the title too.
        lines = [text for line in complaint.getvalue().splitlines()[1:] if (text := line.strip("│╭╮╰╯ "))]
        body = itertools.dropwhile(_is_rule, lines)
        what = " ".join(itertools.takewhile(lambda line: not _is_rule(line), body))
        advice = complaint.getvalue().partition("Perhaps you meant:")[2]
        near = dict.fromkeys(word for word in advice.split()
                             if re.fullmatch("--[a-zA-Z][-.a-zA-Z0-9]*", word) and word != "--help")
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{what}; {guess}{prog} --help has all") from None
    for f in dataclasses.fields(filled):  # type: ignore[arg-type]
        if limits(hint := get_type_hints(type(filled), include_extras=True)[f.name]):
            typed(hint, getattr(filled, f.name), f"--{f.name.replace('_', '-')}")
    return filled


def _is_rule(line: str) -> bool:
    return set(line) <= set("─-")


READABLE = tyro.constructors.ConstructorRegistry()
"""How the help writes what may be None, FLOAT|None, and which numbers a setting takes: (default: 4; expected: 1 to 64)."""
_within: set[type] = set()
"""The dataclasses whose own rule is being asked for."""


@READABLE.struct_rule
def _with_ranges(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    if not dataclasses.is_dataclass(info.type) or info.type in _within:
        return None
    _within.add(info.type)
    try:
        spec = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
    finally:
        _within.remove(info.type)
    if not isinstance(spec, tyro.constructors.StructConstructorSpec):
        return None
    return dataclasses.replace(spec, fields=tuple(
        dataclasses.replace(f, type=Annotated[f.type, tyro.conf.arg(  # type: ignore[arg-type]
            help_behavior_hint=functools.partial(_hint, words))])
        if (words := limits(f.type)) else f for f in spec.fields))


def _hint(expected: str, default: str) -> str:
    return f"(default: {default}; expected: {expected})"


@READABLE.primitive_rule
def _optional(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    kinds = get_args(info.type)
    if len(kinds) != 2 or type(None) not in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    spec = tyro.constructors.ConstructorRegistry.get_primitive_spec(
        tyro.constructors.PrimitiveTypeInfo.make(kind, info.markers))
    if not isinstance(spec, tyro.constructors.PrimitiveConstructorSpec) or spec.choices:
        return None
    return dataclasses.replace(
        spec, metavar=f"{spec.metavar}|None",
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value))


def flags_in(args: Sequence[str]) -> frozenset[str]:
    """The flags among the words of a command line, with - between their words."""
    return frozenset(a.split("=", 1)[0].replace("_", "-") for a in args if a.startswith("--"))


def last_value(flag: str, args: Sequence[str]) -> str | None:
    """The value of flag where it is given last, as --flag value or --flag=value, with - or _ between words."""
    words = [*itertools.chain.from_iterable(a.split("=", 1) if a.startswith("--") else [a] for a in args)]
    values = [b for a, b in itertools.pairwise(words) if a.replace("_", "-") == flag]
    return values[-1] if values else None


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"flexgs: warning: {one_line(' '.join(str(message).split()))}", file=sys.stderr)


def guard(main: Callable[[], int | None]) -> int:
    """Run main, whose warnings are a line each. The exit code: what it returns or 0; 2 with one line for what the user can
    mend, 1 with one line where memory or disk ran out, 130 for Ctrl-C, 143 for SIGTERM, and 1 with a stack trace, which has
    lost its secrets, for a mistake of flexgs."""
    telemetry.turn_off()
    came = listen()
    came.clear()
    warnings.showwarning = _warn
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what a terminal cannot show
    try:
        return main() or 0
    except BrokenPipeError:  # the reader, such as head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as e:
        code, said = _ending(came[-1] if came and not isinstance(e, KeyboardInterrupt) else e)
        print(said, file=sys.stderr)
        return code


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code, and what is said, of a command that an error has ended."""
    if isinstance(error, UserError):
        return 2, f"flexgs: {one_line(public(str(error)))}"
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, Terminated) else 130, f"flexgs: interrupted{f'; {error}' if str(error) else ''}"
    if advice := cure(error):
        return 1, f"flexgs: {advice}, and give the same command again ({one_line(first_line(error))})"
    if isinstance(error, OSError) and error.filename is not None:  # no such folder, no permission, another kind of file
        return 2, f"flexgs: {one_line(public(f'{error.filename}: {error.strerror}'))}"
    return 1, public("".join(traceback.format_exception(error)))


def main() -> None:
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print("usage: flexgs COMMAND ... (flexgs COMMAND --help; flexgs --version)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:8} {(command.__doc__ or '').splitlines()[0]}")
        sys.exit(0)
    if args[0] == "--version":
        print(f"flexgs {version('flexgs')}")
        sys.exit(0)
    if args[0] not in COMMANDS:
        sys.exit(guard(functools.partial(_unknown, args[0])))
    sys.exit(guard(lambda: parse(COMMANDS[args[0]], args[1:], f"flexgs {args[0]}")()))


def _unknown(command: str) -> None:
    raise UserError(f"{command}: no such command, {nearest(command, COMMANDS)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """What to say of a word that is not known: the nearest ones, or all."""
    near = difflib.get_close_matches(word, list(known))
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"


def where_to_go(folder: Path) -> str:
    """Where a trained run is, and what to do with it, to be copied into a shell."""
    run, ply = pasted(folder), pasted(f"{folder.name}.ply")
    return (f"model, cuts and renders: {run}\nnext:\n  flexgs view {run}\n  flexgs cut {run} --budget 20MB -o {ply}\n"
            f"  flexgs eval {run} --ratios 0.02 0.07 0.3")


def load_capture(path: Path, config: Config) -> "Scene":
    """The capture at path, read as config says."""
    from flexgs.scene import load_scene

    data = config.data
    return load_scene(path, factor=data.factor, test_every=data.test_every, masks=data.masks,
                      seed=config.seed, cache_bytes=data.cache_bytes, model=data.model)


def progress_line(scene: str, step: int, m: dict[str, Any]) -> str:
    """One line a person can follow."""
    eta = m["eta_seconds"]
    return (f"{scene:14} stage {m['stage']}  {step:>6}/{m['steps']}  {m['views_per_second']:6.1f} it/s  "
            f"ETA {int(eta // 60):3}:{int(eta % 60):02}  {m['splats']:>9,} Gaussians  {m['psnr']:5.2f} dB on a training view  "
            f"{m['memory_mb'] / 1000:.1f} GB")


def _print_progress(scene: str, step: int, metrics: dict[str, Any]) -> None:
    print(progress_line(scene, step, metrics), flush=True)


def _default_of(f: dataclasses.Field) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return tyro.MISSING if f.default is dataclasses.MISSING else f.default
