"""What a machine with one NVIDIA GPU has to show, in calls of minutes: docs/gpu.md.

    python -m tests.gpu.study {parity,speed,memory,quality} [--tiny] [--minutes 9] [--output DIR]

Prints a Markdown table and writes it, with what it was measured on, to DIR/<study>.md and .json after each of
its parts. The same command goes on with what is missing. Exit code 1 if a bound or target is not kept.
"""

import sys
from collections.abc import Sequence

from flexgs.commands.guard import guard
from flexgs.options import fill
from tests.gpu.memory import Memory
from tests.gpu.parity import Parity
from tests.gpu.quality import Quality
from tests.gpu.record import Study
from tests.gpu.speed import Speed

STUDIES: dict[str, type[Study]] = {"parity": Parity, "speed": Speed, "memory": Memory, "quality": Quality}


def main(args: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if args is None else args
    if not args or args[0] not in STUDIES:
        asked = args and args[0] in ("-h", "--help")
        print(__doc__, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return guard(lambda: fill(STUDIES[args[0]], args[1:], f"study {args[0]}").run())


if __name__ == "__main__":
    sys.exit(main())
