"""Runs the trials of a study as Ray tasks, one for each part of a trial.

A task holds no CPU itself: its training workers and units ask for CPUs and GPUs (`pipeline.sweep.shares`).
"""

from __future__ import annotations

from collections.abc import Callable

import ray
from ray.exceptions import RayError

from pipeline.compute.ray_train import POLL_SECONDS, release_training_group
from pipeline.compute.resources import LEADER_BYTES
from pipeline.compute.session import RaySession
from pipeline.sweep.points import count_sharing_trials
from pipeline.sweep.recorder import StudyRecorder
from pipeline.sweep.shares import TrialSlots
from pipeline.sweep.trial import PartResult, TrialInputs, run_part


def run_trials(
    tasks: dict[str, TrialInputs], share: TrialSlots, recorder: StudyRecorder, poll: Callable[[], object]
) -> None:
    """Run the trials in this Ray session until all have ended, and call `poll` repeatedly meanwhile.

    They start in order, while the study may start one, and as many at once as now have room.
    """
    # CPUs belong to the workers; the memory spreads the trials over the nodes.
    largest = max(int(node["Resources"].get("memory", 1)) for node in ray.nodes() if node["Alive"])
    start = ray.remote(_run_part_in_task).options(
        num_cpus=0, memory=min(LEADER_BYTES, largest), max_retries=0
    )
    waiting, running = list(tasks), dict[ray.ObjectRef, tuple[str, int]]()

    def start_part(key: str, part: int) -> None:
        running[start.remote(tasks[key], tasks[key].parts[part], share)] = key, part

    while waiting or running:
        slots = share.count_slots(RaySession.list_nodes())
        while waiting and len(running) < slots and recorder.may_start_trial():
            recorder.start_trial(waiting[0])
            start_part(waiting.pop(0), 0)
        if not running:
            return
        for call in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
            key, part = running.pop(call)
            try:
                result = ray.get(call)
            except RayError:  # the same command tries again
                result = PartResult(error="its process was lost; Ray's logs in /tmp/ray say more")
            release_training_group(tasks[key].place)
            if recorder.end_part(key, tasks[key].parts[part], result):
                start_part(key, part + 1)
        poll()


def _run_part_in_task(task: TrialInputs, steps: int | None, share: TrialSlots) -> PartResult:
    def count_trials() -> int:
        return count_sharing_trials(task.stop_file.parent, share.count_slots(RaySession.list_nodes()))

    with RaySession.open_for_trial(task.cluster, share.resources, task.should_stop, count_trials) as session:
        return run_part(task, session, steps)
