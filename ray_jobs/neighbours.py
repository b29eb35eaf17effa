"""Who holds the CPUs and GPUs of a cluster, to say why a scene waits."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import ray
from ray.util import state

SECONDS = 5
"""How long the cluster's dashboard, which knows it, may take to answer."""


def holders(kind: str) -> list[str]:
    """Say which other jobs hold resources of a kind: "1 CPU: Simulation, job 02000000 (python sim.py)".

    Empty if there are none, or the dashboard does not answer.

    Args:
        kind: CPU or GPU.
    """
    held: Counter[tuple[str, str]] = Counter()
    try:
        jobs = {job.job_id: job.entrypoint for job in state.list_jobs(timeout=SECONDS)}
        for group in state.list_placement_groups(filters=[("state", "=", "CREATED")], detail=True,
                                                 timeout=SECONDS):
            bundles: Iterable[dict[str, Any]] = group.bundles or ()
            held[group.creator_job_id, group.name or "reserved"] += int(sum(
                bundle.get("unit_resources", bundle).get(kind, 0) for bundle in bundles))
        for actor in state.list_actors(filters=[("state", "=", "ALIVE")], detail=True, timeout=SECONDS):
            if not _grouped(actor):
                held[actor.job_id, actor.class_name] += int((actor.required_resources or {}).get(kind, 0))
        for task in state.list_tasks(filters=[("state", "=", "RUNNING"), ("type", "=", "NORMAL_TASK")],
                                     detail=True, timeout=SECONDS):
            if not _grouped(task):
                held[task.job_id, task.name] += int((task.required_resources or {}).get(kind, 0))
    except Exception:  # the dashboard is away, or of another version: the scene waits all the same
        return []
    ours = ray.get_runtime_context().get_job_id()
    return [f"{count} {kind}{'s' * (count > 1)}: {name}, job {job} ({jobs.get(job) or 'unknown'})"
            for (job, name), count in held.items() if count and job != ours]


def _grouped(of: Any) -> bool:
    """Whether an actor or a task holds what its placement group holds, nothing of its own."""
    return bool(of.placement_group_id) and set(of.placement_group_id) != {"f"}
