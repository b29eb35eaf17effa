"""Ways to make a file of splats smaller, side by side: quality, CPU seconds, peak memory.

    python -m tests.merge_study fox.ply --scene CAPTURE [--factor 4] --output FOLDER
    python -m tests.merge_study plant.splat --output FOLDER      # no capture: against renders of the whole

Every way runs as a process of its own. splat-transform (npm) takes part where Node.js is there.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from flexgs.camera_path import around
from flexgs.config import percent
from flexgs.files import write_json
from flexgs.formats import node, read, save
from flexgs.formats.interchange import SPLAT_TRANSFORM
from flexgs.image.quality import psnr, ssim
from flexgs.raster import render
from flexgs.scene.load import load_scene

RATIOS = (0.5, 0.25, 0.1, 0.05)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.merge_study", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--scene", type=Path)
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    scene = load_scene(options.scene, factor=options.factor) if options.scene else None
    whole = read(options.file)
    plain = options.output / "whole.ply"
    save(whole, plain)
    whole = whole.at(scene.origin) if scene else whole
    if scene:
        views = [(view.camera, view.image().float() / 255) for view in scene.test]
    else:
        cameras = [camera.scaled(640, 480) for camera in around(whole, 8)]
        views = [(camera, render(whole, camera).image.clamp(0, 1)) for camera in cameras]
    rows = []
    for ratio in RATIOS:
        count = int(ratio * len(whole))
        for way, command in ways(plain, count, options).items():
            out = options.output / f"{way.replace(' ', '_')}_{count}.ply"
            seconds, mb = (0.0, 0.0) if way == "random" else timed([*command, str(out)])
            if way == "random":
                chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:count]
                save(whole[chosen], out)
            cut = read(out)
            cut = cut.at(scene.origin) if scene else cut
            images = [(render(cut, camera).image.clamp(0, 1), target) for camera, target in views]
            rows.append({"ratio": ratio, "way": way, "gaussians": len(cut),
                         "psnr": statistics.fmean(psnr(a, b) for a, b in images),
                         "ssim": statistics.fmean(ssim(a, b) for a, b in images),
                         "cpu_seconds": seconds, "peak_mb": mb})
            row = rows[-1]
            print(f"{percent(ratio):>6} {way:28} {len(cut):>9,} {row['psnr']:6.2f} {row['ssim']:.3f} "
                  f"{seconds:6.1f} s {mb:6.0f} MB", flush=True)
            write_json(options.output / "rows.json", rows)
    return 0


def ways(file: Path, count: int, options: argparse.Namespace) -> dict[str, list[str]]:
    """A command for each way, which ends with the name of the output."""
    cut = [sys.executable, "-m", "flexgs", "cut", str(file), "--budget", f"{count} Gaussians"]
    capture = ["--scene", str(options.scene)] if options.scene else []
    found = {"random": [], "prune": [*cut, "--by", "prune", "-o"], "merged": [*cut, "-o"]}
    if shutil.which("node"):
        program = str(node.kept(SPLAT_TRANSFORM, "the study") / "node_modules" / ".bin" / "splat-transform")
        start = [program, "-w", "-g", "cpu", str(file)]
        found |= {"splat-transform uniform": [*start, "--decimate", str(count)],
                  "splat-transform adaptive": [*start, "--decimate-adaptive", str(count)]}
    if capture:
        found |= {"prune, the capture's views": [*cut, "--by", "prune", *capture, "-o"],
                  "merged, 5 s at its cameras": [*cut, *capture, "-o"]}
    return found | {"merged, 5 s at found cameras": [*cut, "--seconds", "5", "-o"]}


def timed(command: list[str]) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of a process. Its own account of the memory would begin with that of
    this process, so /proc is asked while it runs."""
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("VmHWM:")[1].split()[0]))
        time.sleep(0.01)
    if ended[1]:
        raise SystemExit(f"{shlex.join(command)} failed")
    return ended[2].ru_utime + ended[2].ru_stime, peak / 1024


if __name__ == "__main__":
    sys.exit(main())
