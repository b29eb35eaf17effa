"""Threads for the CPU kernels, which release the GIL, so that a plain thread pool runs several at once.

numba's own `parallel=True` is not used: its OpenMP layer spins while it waits, which costs tens of
milliseconds a call once another process wants the core, and from then on torch does the same; its workqueue
layer aborts on concurrent calls.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Lock
from typing import Any

CHUNKS_PER_THREAD = 4  # more than one, or a thread that loses its core for a while holds up the others


def _default_threads() -> int:
    if value := os.environ.get("FLEXGS_NUM_THREADS"):
        return max(1, int(value))
    if hasattr(os, "sched_getaffinity"):  # os.process_cpu_count needs Python 3.13
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_threads = _default_threads()
_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # process id, number of helpers, executor
_lock = Lock()


def get_num_threads() -> int:
    """Return how many threads the kernels use: FLEXGS_NUM_THREADS, or all cores of this process."""
    return _threads


def set_num_threads(n: int) -> None:
    """Set how many threads the kernels use in this process; results do not depend on it."""
    global _threads
    _threads = max(1, int(n))


def _submit(work: Callable[[], None], copies: int) -> list:
    """Start copies of work on the pool of this process (a fork inherits the pool without its threads)."""
    global _pool
    key = os.getpid(), max(copies, _threads - 1)
    with _lock:
        if _pool is None or _pool[:2] != key:
            if _pool is not None and _pool[0] == key[0]:
                _pool[2].shutdown(wait=False)
            _pool = *key, ThreadPoolExecutor(key[1], thread_name_prefix="flexgs")
        return [_pool[2].submit(work) for _ in range(copies)]


def _run(kernel: Callable, spans: Iterable[tuple[int, int]], threads: int, args: tuple[Any, ...]) -> None:
    todo = iter(spans)

    def work() -> None:
        for span in todo:  # next() of a list's iterator is atomic: each span goes to one thread
            kernel(*span, *args)

    futures = _submit(work, threads - 1) if threads > 1 else []
    try:
        work()
    finally:
        for future in futures:
            if not future.cancel():
                future.result()


def run_ranges(kernel: Callable, n: int, *args: Any, grain: int = 2048,
               spread: int = CHUNKS_PER_THREAD) -> None:
    """Call kernel(lo, hi, *args) on ranges that cover [0, n), on several threads where that pays.

    Args:
        kernel: works on the items lo to hi.
        n: number of items.
        args: further arguments of the kernel.
        grain: fewest items per thread; with fewer than two threads' worth there is one call.
        spread: calls per thread.
    """
    threads = max(1, min(_threads, n // grain))
    chunks = 1 if threads == 1 else threads * spread
    edges = [n * c // chunks for c in range(chunks + 1)]
    _run(kernel, list(pairwise(edges)), threads, args)


def run_strides(kernel: Callable, n: int, *args: Any) -> None:
    """Call kernel(worker, workers, *args) for each worker w, which does the items w, w + workers, ... of n.

    Every thread gets at least 8 items.
    """
    threads = max(1, min(_threads, n // 8))
    chunks = 1 if threads == 1 else threads * CHUNKS_PER_THREAD
    _run(kernel, [(c, chunks) for c in range(chunks)], threads, args)
