"""A study: do settings inside their ranges train? Random ones, at the edges of the ranges and inside, over
all presets.

    python -m tests.settings --cases 400 --seed 0

Each case trains a tiny capture for 20 views, with files and evaluation, in a process of its own with limits
of memory and time. It may end well, with finite numbers, or be refused in one line. Everything else is
printed with the flags that repeat it, and the exit code is 1.
"""

import argparse
import collections
import json
import math
import multiprocessing
import random
import resource
import shlex
import signal
import sys
import tempfile
import traceback
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from flexgs import cli
from flexgs.config import PRESETS, Config, settings
from flexgs.errors import UserError
from flexgs.inputs import Range
from flexgs.scene.load import load_capture

SECONDS, LONGEST, BYTES = 60, 600, 8 << 30
"""That a case may take: of the processor, and on the clock, which runs on while others have the machine;
bytes of addresses."""
FIXED = ["--steps", "20", "--data.factor", "1", "--base.max-splats", "300", "--base.refine-every", "5",
         "--evaluation.lpips"]
LEFT_OUT = {"--preset", "--steps", "--base.ply", "--data.factor", "--data.cache-gb", "--base.max-splats",
            "--evaluation.lpips", "--evaluation.lpips-weights", "--evaluation.format"}
"""The first two name a case, the others ask for files or programs."""


def draw(kind: Any, rng: random.Random) -> list[str] | None:
    """A value of an annotated type, as words of a command line; None if the type has no range to draw
    from."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    limits = next((a for a in args[1:] if isinstance(a, Range)), None) if origin is Annotated else None
    if limits and typing.get_origin(args[0]) is tuple:
        entry = typing.get_args(args[0])[0]
        count = rng.choice([int(limits.low), rng.randint(1, 4), int(min(limits.high, 16))])
        return _words(draw(entry, rng) for _ in range(count))
    if limits:
        return [_number(limits, args[0], rng)]
    if origin is tuple:
        return _words(draw(a, rng)
                      for a in (args if args[-1] is not Ellipsis else [args[0]] * rng.randint(1, 4)))
    if type(None) in args:
        return ["None"] if rng.random() < 0.2 else draw(args[0], rng)
    if origin is Literal:
        return [str(rng.choice(args))]
    return None


def _words(entries: typing.Iterable[list[str] | None]) -> list[str]:
    return [word for entry in entries for word in entry or []]


def _number(limits: Range, kind: type, rng: random.Random) -> str:
    """An end, next to an end, or inside, there on a logarithmic scale; one in twenty lies outside."""
    low, high = limits.low, limits.high
    small = max(low, high * 1e-9)
    inside = math.exp(rng.uniform(math.log(small), math.log(high)))
    value = rng.choice([low, high, low + (1 if kind is int else 1e-9 * high), inside, inside, inside])
    if rng.random() < 0.05:
        value = rng.choice([math.nan, -1.0, 2 * high])
    if kind is float:
        return repr(float(value))
    return "nan" if math.isnan(value) else str(int(value))


def case(rng: random.Random) -> list[str]:
    """The flags of a case: a preset and one to four settings."""
    preset = rng.choice(list(PRESETS))
    known = [(flag, kind) for flag, kind, _ in settings(Config()) if flag not in LEFT_OUT]
    flags = ["--preset", preset, *FIXED]
    for flag, kind in rng.sample(known, rng.randint(1, 4)):
        if kind is bool:
            flags.append(flag if rng.random() < 0.5 else "--no-".join(flag.split("--")) if "." not in flag
                         else ".no-".join(flag.rsplit(".", 1)))
        elif (words := draw(kind, rng)) is not None:
            flags += [flag, *words]
    return flags


def _train(flags: list[str], capture: Path, answer: Any) -> None:
    """In the process of a case: sends how it ended, and what was said."""
    from flexgs.distributed import Group
    from flexgs.model.elastic import ElasticModel
    from flexgs.run import LocalSession, run
    from flexgs.training.trainer import NonFiniteLossError

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    try:
        config = cli.parse(cli.Train, [str(capture), *flags], "flexgs train").config.check()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            run(config, load_capture(capture, config), out, Group(),
                LocalSession(out, Group(), lambda step, metrics: None))
            model = ElasticModel.load(out)
            finite = all(bool(t.isfinite().all()) for _, t in model.splats.items())
            figures = [row["psnr"]
                       for row in json.loads((out / "results.json").read_text())["ratios"].values()]
        answer.send(("ok", "") if finite and all(map(math.isfinite, figures))
                    else ("nan", "in the model or its figures"))
    except NonFiniteLossError as e:
        answer.send(("nan", str(e)))
    except UserError as e:
        answer.send(("refused", str(e)) if "\n" not in str(e) else ("crash", str(e)))
    except MemoryError:
        answer.send(("memory", ""))
    except BaseException:
        answer.send(("crash", traceback.format_exc()))


def outcome(flags: list[str], capture: Path) -> tuple[str, str]:
    """(ok, refused, nan, crash, memory or hang; what was said) of a case."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_train, args=(flags, capture, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(LONGEST) else ("hang", f"more than {LONGEST} s")
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return "hang", f"more than {SECONDS} s of the processor"
        return "crash", f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def main() -> int:
    from flexgs.demo.synthetic import write_synthetic

    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        capture = write_synthetic("studio", Path(folder) / "studio", views=12, width=64, height=48)
        for i in range(options.cases):
            flags = case(random.Random(f"{options.seed} {i}"))
            how, said = outcome(flags, capture)
            counts[how] += 1
            if how not in ("ok", "refused"):
                print(f"{i}: {how}: flexgs train CAPTURE {shlex.join(flags)}\n{said}", flush=True)
    print(f"{options.cases} cases: " + ", ".join(f"{n} {how}" for how, n in counts.most_common()))
    return 1 if set(counts) - {"ok", "refused"} else 0


if __name__ == "__main__":
    sys.exit(main())
