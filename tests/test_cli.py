"""The command line as a person uses it, good and bad input alike."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgs import cli
from flexgs.config import PRESETS
from flexgs.demo.synthetic import write_synthetic
from flexgs.sizes import fitting
from tests.test_scene import to_transforms

SMALL = ["--preset", "smoke", "--steps", "40", "--data.factor", "1", "--base.max-splats", "800",
         "--report-every", "20"]


def flexgs(*args: object) -> int:
    """Run a command in this process; its exit code."""
    arguments = [str(a) for a in args]
    return cli.guard(lambda: cli.parse(cli.COMMANDS[arguments[0]], arguments[1:], "flexgs")())


@pytest.fixture(scope="module")
def trained(capture, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert flexgs("train", capture, "--output", out, *SMALL) == 0
    return out / "studio"


def test_train_then_skip_then_continue(trained, capture, capsys):
    again = ["train", capture, "--output", trained.parent, *SMALL]
    assert flexgs(*again) == 0
    assert "already finished at 40 views" in capsys.readouterr().out
    assert flexgs(*again, "--order.temperature", "0") == 2  # finished, but by another method
    assert "was trained with another order" in capsys.readouterr().err
    assert flexgs(*again, "--steps", "60") == 0
    assert json.loads((trained / "results.json").read_text())["steps"] == 60
    assert "stage 2" in capsys.readouterr().out


def test_eval_and_cut(trained, capture, tmp_path, capsys):
    assert flexgs("eval", trained, "--scene", capture, "--ratios", "0.02", "1", "--json") == 0
    measured = json.loads(capsys.readouterr().out)["ratios"]
    assert set(measured) == {"0.02", "1"} and measured["1"]["splats"] > 40 * measured["0.02"]["splats"] > 0
    out = tmp_path / "x.ply"
    assert flexgs("cut", trained, "--budget", "10%", "-o", out) == 0
    assert "Gaussians" in capsys.readouterr().out and out.stat().st_size > 1000


def test_settings_are_flags(capture):
    command = cli.parse(cli.Train,
                        [str(capture), "--preset", "paper", "--field.resolution", "64", "64", "64", "150",
                         "--gsnet.shape", "code", "--loss.elastic-ssim", "0"], "flexgs train")
    assert command.config.preset == "paper" and command.config.order.kind == "gsnet"
    assert command.config.field.resolution == (64, 64, 64, 150)
    assert command.config.gsnet.shape == "code" and command.config.loss.elastic_ssim == 0


@pytest.mark.parametrize(("words", "said"), [
    (["trian", "x"], "trian: no such command, did you mean train?"),
    (["train", "x", "--stepz", "7"], "--stepz, 7; did you mean --steps?"),
    (["bench", "rastr"], "did you mean raster?"),
    (["train", "x", "--preset", "papr"], "--preset papr: unknown; did you mean paper?"),
    (["train", "x", "--device", "cpu", "--lr.means", "nan"],
     "--lr.means: found nan, expected 0 to 0.1"),
])
def test_what_is_not_known_is_named_with_what_is_near(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flexgs", *words])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert said in line_of(capsys)


def test_help_can_be_read_alone(monkeypatch, capsys):
    def output(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["flexgs", *words])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        return capsys.readouterr().out

    assert all(f"  {name} " in output() for name in cli.COMMANDS)
    assert output("--version").startswith("flexgs ")
    text = output("train", "--help-all")
    assert "{None}" not in text and all(f"  {name} " in text for name in PRESETS)
    words = " ".join(text.replace("│", " ").split())
    assert "--data.factor INT Train on images 1/N as wide" in words
    assert "(default: 4; expected: 1 to 64)" in words
    assert "views each). A higher number" in text  # lines of a docstring are joined
    assert "(default: 0.01 0.05 0.1 0.15 0.5 1.0; expected: 1e-06 to 1; 1 to 1,000 entries)" in words


@pytest.mark.parametrize("command", [*cli.COMMANDS, "data list", "data get", "data check", "data make"])
def test_help_fits_a_screen(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["flexgs", *command.split(), "--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    if "--preset" in text:  # presets are named where they are chosen, and how to see the other settings
        assert all(f" {name}" in text for name in PRESETS)
        assert "--lr.means" not in text and f"flexgs {command} --help-all shows every flag" in text
    if command in ("cut", "view", "render", "info", "pack", "eval", "serve"):
        assert " RUN" in text.splitlines()[0]
    if command in ("train", "adapt", "compare"):
        assert " CAPTURE" in text or "[CAPTURE]" in text


def test_a_shell_completes_commands_flags_and_choices(capsys, tmp_path):
    assert flexgs("completion", "bash") == 0
    (tmp_path / "flexgs.bash").write_text(capsys.readouterr().out)
    ask = ("source flexgs.bash; complete -p flexgs; ask() { COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); "
           "_tyro_flexgs; echo ${COMPREPLY[@]}; }; ask flexgs tr; ask flexgs train x --st; "
           "ask flexgs cut x --by ''; ask flexgs train x --lr.mea; ask flexgs cut r")
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == ["complete -o default -F _tyro_flexgs flexgs", "train", "--steps",
                                        "merge prune", "--lr.means", ""]


def test_without_a_gpu_a_run_is_small_and_says_so(capture, tmp_path, capsys):
    """What the user typed is not touched; paths are printed so that they can be copied."""
    out = tmp_path / "my runs"
    assert flexgs("train", capture, "--output", out, "--device", "cpu", *SMALL, "--steps", "20",
                  "--base.max-splats", "40000", "--evaluation.lpips") == 0
    said = capsys.readouterr().out
    assert "no GPU" not in said and f"flexgs cut '{out}/studio' --budget" in said and "test PSNR" in said
    command = cli.parse(cli.Train, [str(capture), "--steps", "31000", "--device", "cpu"], "flexgs train")
    small = fitting(command.config, False, command.typed)
    assert (small.steps, small.base.max_splats) == (31_000, 30_000)
    assert "no GPU: 31,000 views, at most 30,000 Gaussians" in capsys.readouterr().out


def broken(capture: Path, folder: Path, name: str, size: int | None) -> Path:
    """A copy of the capture with one file truncated to size bytes, or removed."""
    shutil.copytree(capture, folder)
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(whole[:size])
    return folder


def line_of(capsys) -> str:
    """The one line that a user's mistake is answered with."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("flexgs: "), lines
    return lines[0]


def test_bad_captures(capture, tmp_path, capsys):
    image = sorted((capture / "images").iterdir())[1].name
    cases = {
        "no such folder": (tmp_path / "nowhere", "nowhere"),
        "no capture": (tmp_path, str(tmp_path)),
        "truncated model": (broken(capture, tmp_path / "a", "sparse/0/images.bin", 100), "images.bin"),
        "image missing": (broken(capture, tmp_path / "b", f"images/{image}", None), image),
        "image unreadable": (broken(capture, tmp_path / "c", f"images/{image}", 300), image),
    }
    for case, (folder, named) in cases.items():
        out = tmp_path / "out"
        assert flexgs("train", folder, "--output", out, *SMALL) == 2, case
        assert named in line_of(capsys), case
        assert not list(out.glob("*/results.json")), case


@pytest.mark.parametrize(("options", "named"), [
    (["--evaluation.ratios", "0.1", "1.5"], "evaluation.ratios: found 1.5"),
    (["--steps", "0"], "--steps: found 0"),
    (["--preset", "nonsense"], "--preset nonsense"),
    (["--order.score", "beauty"], "--order.score: found 'beauty', expected one of alpha_t"),
    (["--device", "cuda:7"], "--device cuda:7"),
    (["--stepz", "7"], "--stepz"),
    (["--steps", "many"], "many"),
    (["--config", "some.json"], "--config and --preset"),
    (["--config", ""], "--config and --preset"),
    (["--preset", ""], "--preset : unknown"),
])
def test_bad_options(capture, tmp_path, capsys, options, named):
    assert flexgs("train", capture, "--output", tmp_path, *SMALL, *options) == 2
    assert named in line_of(capsys)


def test_bad_runs_and_outputs(trained, capture, tmp_path, capsys):
    assert flexgs("cut", tmp_path, "--budget", "5%", "-o", tmp_path / "x.ply") == 2
    assert "not a flexgs model" in line_of(capsys)
    assert flexgs("cut", trained, "--budget", "5%", "-o", tmp_path / "x.obj") == 2
    assert "ends in one of .ply" in line_of(capsys)
    assert flexgs("eval", trained, "--scene", capture, "--ratios", "0") == 2
    assert "found 0" in line_of(capsys)
    (tmp_path / "file").write_text("")
    assert flexgs("train", capture, "--output", tmp_path / "file", *SMALL) == 2
    assert "cannot be written" in line_of(capsys)


def test_the_installed_command_ends_with_its_code(tmp_path):
    """As a process: no stack trace, exit code 2."""
    done = subprocess.run([sys.executable, "-m", "flexgs", "train", str(tmp_path / "nowhere")],
                          capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}, check=False)
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], capture_output=True,
                      check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_loses_nothing(capture, small_disk, tmp_path, capsys):
    """One line, exit code 1, what was there stays; with room again, the run ends as if there had always
    been."""
    arguments = ["train", capture, *SMALL, "--steps", "40", "--checkpoint-every", "20", "--output"]
    more = ["train", capture, *SMALL, "--steps", "80", "--checkpoint-every", "20", "--output"]
    assert flexgs(*arguments, small_disk) == 0 == flexgs(*arguments, tmp_path)
    run = small_disk / "studio"
    before = {file: file.read_bytes() for file in (run / "model").iterdir()}
    with contextlib.suppress(OSError), (small_disk / "junk").open("wb", buffering=0) as junk:
        while True:
            junk.write(bytes(1000))
    capsys.readouterr()
    assert flexgs(*more, small_disk) == 1
    warned, failed = capsys.readouterr().err.splitlines()
    assert "0.0 GB of disk are free" in warned
    assert failed.startswith("flexgs: the disk is full: free some of it, and give the same command again")
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step_00000020", "step_00000040"}
    assert before == {file: file.read_bytes() for file in before}
    assert json.loads((run / "results.json").read_text())["steps"] == 40
    (small_disk / "junk").unlink()
    assert flexgs(*more, small_disk) == 0 == flexgs(*more, tmp_path)
    assert (run / "model/model.safetensors").read_bytes() == (tmp_path
                                                              / "studio/model/model.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [20, 40, 60, 80]


@pytest.mark.parametrize(("sent", "code", "layout"), [
    (signal.SIGTERM, 143, "colmap"), (signal.SIGINT, 130, "colmap"), (signal.SIGTERM, 143, "transforms")])
def test_an_interrupted_run_keeps_the_step_it_was_at(sent, code, layout, capture, tmp_path):
    """The line tells the truth: there is a checkpoint of those views, and the same command continues there.
    pycolmap, which lenses need, would print a stack trace."""
    if layout == "transforms":
        capture = Path(shutil.copytree(capture, tmp_path / "captures" / "studio"))
        to_transforms(capture, k1=0.01)
    command = [sys.executable, "-m", "flexgs", "train", str(capture), *SMALL, "--steps", "100000", "--output",
               str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("stage 1" in line for line in process.stdout)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code
    *doubts, first, last = errors.splitlines()
    assert len(doubts) == (layout == "transforms")  # that there are no points
    assert "once more ends at once" in first
    views = re.fullmatch(r"flexgs: interrupted; the checkpoint of (\S+) of 100,000 views is kept; the "
                         r"same command continues "
                         "from there", last)
    assert views, last
    step = int(views[1].replace(",", ""))
    assert (tmp_path / f"studio/checkpoints/step_{step:08d}").is_dir()


def test_where_nothing_is_kept_nothing_is_promised(capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert cli.guard(interrupted) == 130
    assert capsys.readouterr().err == "flexgs: interrupted\n"


def test_another_capture_of_the_same_name_is_refused(trained, capture, tmp_path, capsys):
    """house/dense, then car/dense: neither handed back, nor continued, nor measured."""
    other = write_synthetic("courtyard", tmp_path / "studio", views=18, width=64, height=48)
    before = (trained / "model/model.safetensors").read_bytes()
    for command in (["train", other, "--output", trained.parent, *SMALL],
                    ["train", other, "--output", trained.parent, *SMALL, "--steps", "80"],
                    ["eval", trained, "--scene", other], ["view", trained, "--scene", other]):
        assert flexgs(*command) == 2
        line = line_of(capsys)
        assert "was made from another capture, with other sizes of image files; " in line, line
        assert ("--scene" if command[0] in ("eval", "view") else "another --output") in line
    assert (trained / "model/model.safetensors").read_bytes() == before


def test_eval_finds_the_capture_of_a_run(trained, tmp_path, capsys):
    assert flexgs("eval", trained, "--ratios", "1", "--lpips", "--json") == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["test_views"] == 3
    shutil.copytree(trained / "model", tmp_path / "model")
    assert flexgs("eval", tmp_path / "model") == 2
    assert "does not say where its capture is; give it with --scene" in line_of(capsys)


def test_what_fails_late_is_found_first(capture, tmp_path, capsys):
    assert flexgs("train", capture, "--output", tmp_path, *SMALL, "--evaluation.lpips-weights",
                  tmp_path / "none") == 2
    assert "found no LPIPS backbone" in line_of(capsys)
    assert not list(tmp_path.rglob("step_*"))


def test_a_ply_of_a_run_is_adapted_beside_it(trained, capture, tmp_path, monkeypatch):
    """With default folders, as the README has it."""
    monkeypatch.chdir(tmp_path)
    ply = next((trained / "cuts").glob("*100.00pct.ply"))
    shutil.copytree(trained, tmp_path / "runs/flexgs/studio")
    small = [flag for flag in SMALL if flag not in ("--base.max-splats", "800")]
    assert flexgs("adapt", capture, "--ply", ply, *small, "--evaluation.lpips") == 0
    assert (tmp_path / "runs/adapted/studio/results.json").exists()


def test_killed_at_any_moment_and_started_again(capture, tmp_path):
    """SIGKILL in stage 1 and again in stage 2; the model and its figures are those of an uninterrupted run,
    bit for bit."""
    command = [sys.executable, "-m", "flexgs", "train", str(capture), *SMALL, "--steps", "400",
               "--checkpoint-every", "20", "--evaluation.lpips"]

    def start(folder: str) -> subprocess.Popen:
        return subprocess.Popen([*command, "--output", str(tmp_path / folder)], stdout=subprocess.DEVNULL,
                                env={**os.environ, "FLEXGS_NUM_THREADS": "1"})

    whole = start("whole")
    for seen in ("step_00000060", "step_00000260"):
        process = start("killed")
        deadline = time.monotonic() + 120
        checkpoints = tmp_path / "killed/studio/checkpoints"
        while max((p.name for p in checkpoints.glob("step_*")), default="") < seen:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert start("killed").wait() == 0 and whole.wait() == 0
    one, two = (json.loads((tmp_path / name / "studio/results.json").read_text())["ratios"]
                for name in ("whole", "killed"))
    for row in (*one.values(), *two.values()):
        del row["ms"], row["cut_seconds"]
    assert one == two
    files = [(tmp_path / name / "studio/model/model.safetensors").read_bytes()
             for name in ("whole", "killed")]
    assert files[0] == files[1]
    steps = [json.loads(line)["step"]
             for line in (tmp_path / "killed/studio/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(20, 401, 20))  # none lost, none repeated


@pytest.mark.parametrize(("words", "said"), [
    (["compare", "CAPTURE", "--methods"], "--methods: found none"),
    (["compare", "CAPTURE", "--methods", " "], "--methods ' ': found nothing"),
    (["compare", "CAPTURE", "--methods", 'default "'], "No closing quotation"),
    (["compare", "CAPTURE", "--methods", "default --preset paper --seed 4"],
     "found another preset, seed, which all methods"),
    (["eval", "RUN", "--ratios"], "--ratios: found 0 entries"),
    (["cut", "RUN", "--budget", "1e400MB", "-o", "x.ply"], "budget '1e400MB': found more than any model has"),
    (["cut", "RUN", "--budget", "5ms", "--size", "0", "9", "-o", "x.ply"],
     "--size: found 0, expected 16 to 16,384"),
    (["render", "RUN", "--frames", "0", "-o", "x.png"], "--frames: found 0, expected 1 to 1,000,000"),
    (["render", "RUN", "--size", "17", "16", "-o", "x.png"], "expected width and height even"),
    (["view", "RUN", "--host", ""], "--host: found nothing"),
    (["serve", "RUN", "--port", "-1"], "--port: found -1, expected 0 to 65,535"),
    (["bench", "ddp", "--rounds", "0"], "--rounds: found 0"),
    (["bench", "raster", "--points", "RUN/results.json"], "results.json: not a readable points file"),
    (["data", "make", "RUN/results.json/x"], "results.json/x: Not a directory"),
    (["info", "a\x1b[31mb\nc"], r"a\x1b[31mb c: no such file"),
])
def test_what_cannot_be_is_one_line(words, said, trained, capture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("RUN", str(trained)).replace("CAPTURE", str(capture)) for word in words]
    assert flexgs(*words, *(["--output", tmp_path, *SMALL] if words[0] == "compare" else [])) == 2
    assert said in line_of(capsys) and not list(tmp_path.glob("*.*"))


def test_paths_are_printed_as_they_are_typed(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a b", "it's", "$HOME;x", "-dash", os.fsdecode(b"\xff")):
        capsys.readouterr()
        assert flexgs("cut", trained, "--budget", "5%", f"--output={name}/{name}.ply") == 0
        assert flexgs("cut", trained, "--lod", "100", f"--output={name}/lod") == 0
        assert flexgs("pack", trained, f"--output={name}.fgs") == 0
        printed = [line.rpartition(": ")[0] for line in capsys.readouterr().out.splitlines()
                   if not line.startswith("up to")]
        typed = [str(Path(word)) for line in printed for word in shlex.split(line)]
        assert name.isprintable() is False or typed == [f"{name}/{name}.ply", f"{name}/lod", f"{name}.fgs"]


def test_an_interruption_that_a_library_turns_into_an_error_is_one(capsys):
    """As Ctrl-C does while SciPy is being imported."""
    def interrupted(sent: signal.Signals) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(sent)
        raise RecursionError("maximum recursion depth exceeded")

    for sent, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        assert cli.guard(lambda sent=sent: interrupted(sent)) == code
        assert capsys.readouterr().err == "flexgs: interrupted\n"


def test_a_stack_trace_has_no_secret(capsys):
    def fail() -> None:
        raise RuntimeError("no answer from postgresql://me:hush@db/mlflow")

    assert cli.guard(fail) == 1
    said = capsys.readouterr().err
    assert ("Traceback" in said and "RuntimeError: no answer from postgresql://db/mlflow" in said
            and "hush" not in said)


def test_an_old_config_that_holds_what_cannot_be_is_named(trained, capture, tmp_path, capsys):
    values = json.loads((trained / "config.json").read_text())
    old = tmp_path / "old.json"
    for part, key, value, said in (("lr", "means", 5,
                                    "old.json: lr: means: found 5.0, expected 0 to 0.1"),
                                   ("ratios", "bands", [[0.5, 0.1]],
                                    "old.json: --ratios.bands: found 0.5 0.1")):
        old.write_text(json.dumps({**values, part: {**values[part], key: value}}))
        assert flexgs("train", capture, "--config", old, "--output", tmp_path) == 2
        assert said in line_of(capsys)
