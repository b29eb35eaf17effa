"""What several GPUs would gain, from what `flexgs bench ddp` has counted and assumptions that it prints."""

from collections.abc import Iterable
from typing import NamedTuple

GPUS = (8, 64)


class Link(NamedTuple):
    """A connection between GPUs, each of which has one of its own."""

    name: str
    bandwidth: float
    """Bytes per second that a GPU sends."""
    latency: float
    """Seconds that a message takes besides."""


LINKS = (Link("NVLink 3", 200e9, 5e-6), Link("PCIe 4", 20e9, 10e-6), Link("Ethernet", 11e9, 30e-6))
"""The bus bandwidths that users of NCCL's all_reduce_perf report for A100s (NVIDIA/nccl-tests issues 149 and
178), and 88 % of 100 Gbit/s; the latencies are assumptions."""


class Traffic(NamedTuple):
    """What a worker sends in a step."""

    whole: float
    """Bytes that ever more workers come near to: W of them send (W - 1) / W of it each."""
    sums: float
    """Number of ring all-reduces, each of 2 (W - 1) messages one after the other."""
    exchanges: float
    """Number of all-to-alls, each taken as W - 1 messages one after the other."""

    def seconds(self, world: int, link: Link) -> float:
        """Return the time that `world` GPUs send each other for in a step."""
        messages = (world - 1) * (2 * self.sums + self.exchanges)
        return self.sent(world) / link.bandwidth + messages * link.latency

    def sent(self, world: int) -> float:
        """Return the bytes that each of `world` workers sends in a step."""
        return (world - 1) / world * self.whole


class Target(NamedTuple):
    """The training whose speed-up is predicted."""

    splats: int = 3_000_000
    """Number of Gaussians."""
    seen: float = 0.25
    """Fraction of them that a view sees."""
    step_ms: float = 30.0
    """Milliseconds of a step of stage 1 with one view on one GPU."""


class Measured(NamedTuple):
    """A stage and mode of the bench."""

    stage: int
    mode: str
    traffic: Traffic
    longer: float
    """How many times as long as a step of stage 1 a step of this stage is on one worker."""


def print_prediction(target: Target, measured: Iterable[Measured], count: int, seen: float) -> None:
    """Print the speed-ups W t / (t + seconds of communication) of GPUS over LINKS.

    Args:
        target: what to predict for.
        measured: the traffic of each stage and mode.
        count: the number of Gaussians that it was counted with. Bytes grow in proportion.
        seen: the fraction of them that a view saw; what shards exchange grows in proportion.
    """
    print(f"\nspeed-up predicted for {target.splats:,} Gaussians, of which a view sees {target.seen:.0%} "
          f"(here {seen:.0%}), a view per GPU and step, {target.step_ms:g} ms for a step of stage 1 on one "
          "GPU")
    links = (f"{link.name} {link.bandwidth / 1e9:g} GB/s, {1e6 * link.latency:g} µs a message"
             for link in LINKS)
    print("assumed: " + "; ".join(links) + "; a link for each GPU, nothing sent while a GPU computes, no "
          "waiting for the slowest")
    heads = ["stage", "mode", "step, ms", *(f"MB sent, {gpus}" for gpus in GPUS),
             *(f"{link.name}, {gpus}" for link in LINKS for gpus in GPUS)]
    print("".join(f"{head:>14}" for head in heads))
    for stage, mode, traffic, longer in measured:
        grown = traffic.whole * target.splats / count * (target.seen / seen if mode == "sharded" else 1)
        traffic, seconds = traffic._replace(whole=grown), longer * target.step_ms / 1e3
        cells = [f"{stage}", mode, f"{1e3 * seconds:.1f}"]
        cells += [f"{traffic.sent(gpus) / 1e6:.0f}" for gpus in GPUS]
        cells += [f"{gpus * seconds / (seconds + traffic.seconds(gpus, link)):.1f}" for link in LINKS
                  for gpus in GPUS]
        print("".join(f"{cell:>14}" for cell in cells))
