"""Progress of a phase as lines of text, with the time that is left."""

import time

EVERY_SECONDS = 5.0
"""Time between two lines of a phase."""


class Phase:
    """A phase of a known number of items; a line says how far it is, and a last one how long it took."""

    def __init__(self, name: str, total: int, items: str):
        """Begin a phase: `items` is what the total counts, such as "photographs"."""
        self.name, self.total, self.items = name, total, items
        self._began = self._shown = time.monotonic()

    def done(self, count: int) -> None:
        """Say that `count` of the items are done, unless the last line is younger than EVERY_SECONDS."""
        now = time.monotonic()
        if count and now - self._shown >= EVERY_SECONDS:
            self._shown = now
            left = (now - self._began) * max(0, self.total - count) / count
            print(f"{self.name}: {count:,} of {self.total:,} {self.items}, about {clock(left)} left",
                  flush=True)

    def end(self, found: str = "") -> None:
        """Say how long the phase took, and what it found."""
        print(f"{self.name}: {self.total:,} {self.items}{found}, {clock(time.monotonic() - self._began)}",
              flush=True)


def clock(seconds: float) -> str:
    """Write a number of seconds as minutes and seconds: 95 -> "1:35"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
