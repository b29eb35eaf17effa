"""A small share of the study of settings; `python -m tests.settings --cases 400` is the whole."""

import random
import subprocess
import sys
from pathlib import Path

from tests.settings import case


def test_settings_train_or_are_refused_in_a_line():
    done = subprocess.run([sys.executable, "-m", "tests.settings", "--cases", "6", "--seed", "suite"],
                          capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok" in done.stdout.splitlines()[-1]


def test_cases_repeat_and_name_flags():
    flags = case(random.Random("0 1"))
    assert flags == case(random.Random("0 1")) != case(random.Random("0 2")) and flags[0] == "--preset"
