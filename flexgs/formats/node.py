"""Programs of the npm registry, at fixed versions, where Node is installed."""

import shutil
import subprocess
from pathlib import Path

from flexgs.errors import UserError


def npx(package: str, program: str, *args: str | Path) -> str:
    """Run a program of a package, which is fetched on first use, and return what it prints; UserError as run()."""
    return run("npx", "--yes", "--package", package, "--", program, *args, doing=program)


def run(command: str, *args: str | Path, doing: str, folder: Path | None = None) -> str:
    """Run npx or npm in folder and return what it prints; UserError if Node is absent, or with the last line if it fails."""
    found = shutil.which(command)
    if not found:
        raise UserError(f"{doing}: found no {command}, which it needs; install Node.js 20 or newer (nodejs.org)")
    done = subprocess.run([found, *map(str, args)], capture_output=True, text=True, check=False, cwd=folder, errors="replace")
    said = done.stdout + done.stderr
    if done.returncode:
        lines = [line for line in said.splitlines() if line.strip()]
        raise UserError(f"{doing} failed: {lines[-1].strip() if lines else f'exit code {done.returncode}'}")
    return said
