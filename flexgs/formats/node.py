"""Programs of the npm registry, run by an installed Node.js.

Only the packages that a package-lock.json names are fetched, and none of their install scripts is run.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from flexgs import bounded
from flexgs.errors import UserError
from flexgs.files import atomic_folder, make_folder, only_one
from flexgs.inputs import parse_json
from flexgs.urls import public

FETCH = 600.0
"""Seconds that fetching all packages may take."""
_CI = ("ci", "--json", "--ignore-scripts", "--no-audit", "--no-fund", "--logs-max=0", "--fetch-retries=1",
       "--fetch-retry-mintimeout=1000")
_CURES = {"EUSAGE": "package.json and package-lock.json do not belong together; install flexgs again",
          "EINTEGRITY": "the registry has sent something else than package-lock.json names; is there a "
                        "proxy that changes it?"}
"""Advice for error codes of npm; UNREACHED is the advice for any other."""
UNREACHED = "the npm registry is needed once; npm config get registry says where it is looked for"


def cache() -> Path:
    """Return the folder for fetched and built files: $XDG_CACHE_HOME/flexgs, else ~/.cache/flexgs."""
    return make_folder(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "flexgs")


def digest(source: Path) -> str:
    """Hash a folder's packages and programs, and the platform, since packages may hold machine code."""
    parts = [platform.system(), platform.machine(), *(file.read_text() for file in _files(source))]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=6).hexdigest()


def fetch(source: Path, folder: Path, doing: str) -> None:
    """Copy source's programs and package-lock.json into folder, and fetch the packages into its node_modules.

    UserError if they cannot be fetched; it begins with `doing`, the task or option that needs them.
    """
    for file in _files(source):
        shutil.copy(file, folder)
    done = _run([_installed("npm", doing), *_CI], FETCH, doing, folder)
    if done.returncode:
        try:
            error = parse_json(done.stdout.encode(), "npm")["error"]
            code, said = str(error["code"]), str(error["summary"])
        except (UserError, KeyError, TypeError):  # npm was killed, or is of another version
            code, said = "", done.stderr
        reason = _line(said) or f"exit code {done.returncode}"
        raise UserError(f"{doing}: npm ci failed ({reason}); {_CURES.get(code, UNREACHED)}")


def kept(source: Path, doing: str) -> Path:
    """Return a folder in the cache with the packages of source, fetched by the first process that asks."""
    folder = cache() / "npm" / f"{source.name}-{digest(source)}"
    if not folder.exists():
        with only_one(folder.parent, wait=True):
            if not folder.exists():
                with atomic_folder(folder) as temporary:
                    fetch(source, temporary, doing)
    return folder


def run(folder: Path, program: str, *args: str | Path, seconds: float, doing: str) -> str:
    """Run a program of the packages in folder, in the current directory, and return what it prints.

    UserError with the program's last line if it fails, or if it takes longer than `seconds`.
    """
    _installed("node", doing)
    done = _run([folder / "node_modules" / ".bin" / program, *args], seconds, doing)
    said = done.stdout + done.stderr
    if done.returncode:
        raise UserError(f"{doing} failed: {_line(said, -1) or f'exit code {done.returncode}'}")
    return said


def _line(said: str, which: int = 0) -> str:
    """Return one line of a program's output, without secrets."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return public(lines[which])[:200] if lines else ""


def _files(source: Path) -> list[Path]:
    return sorted(source.glob("*.js*"))


def _installed(command: str, doing: str) -> str:
    if found := shutil.which(command):
        return found
    raise UserError(f"{doing}: found no {command}, which it needs; install Node.js 20 or newer (nodejs.org)")


def _run(command: list[str | Path], seconds: float, doing: str,
         folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return bounded.run(command, seconds, folder=folder)
    except subprocess.TimeoutExpired:
        program = Path(command[0]).name
        raise UserError(f"{doing}: {program} did not end in {seconds:.0f} s; try again") from None
