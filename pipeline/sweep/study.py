"""The driver of a sweep: what is to do, who does it, and the same again after an interruption."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from pipeline import tracking
from pipeline.compute.interrupt import Interrupt, Interrupted
from pipeline.compute.work import Executor, InProcess, Unit
from pipeline.config import ClusterConfig
from pipeline.console import bar, duration, following, say
from pipeline.engine import execute as stages
from pipeline.errors import PipelineError
from pipeline.scores.metrics import LOSS
from pipeline.scores.preparations import missing_preparations
from pipeline.stages import evaluate
from pipeline.store.files import exclusive
from pipeline.sweep import budget, leaderboard
from pipeline.sweep.board import Board
from pipeline.sweep.definition import Sweep, load_sweep
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.points import Point, points
from pipeline.sweep.resources import Node, Share, share, this_machine
from pipeline.sweep.trials import locate
from pipeline.sweep.work import Order, carry_out


class Study:
    """A sweep over a storage root. The driver alone writes the sweep's folder and talks to MLflow; trials write
    run directories."""

    def __init__(self, sweep: Sweep, points: list[Point], cluster: ClusterConfig, note: str = ""):
        self.sweep, self.cluster = sweep, cluster
        self.note = note  # what a reader has to know before any number
        self.root = stages.storage_root(cluster)
        self.folder = self.root / "sweeps" / sweep.name
        self.trials = {trial.key: trial for trial in locate(points, self.root)}
        self.ledger = self._judged_ledger()
        self.interrupt = Interrupt(self.folder / ".stop")
        self.board: Board

    def _judged_ledger(self) -> Ledger:
        ledger = Ledger.open(self.folder, self.sweep)
        ledger.judge(list(self.trials.values()))
        return ledger

    def todo(self) -> list[str]:
        return [key for key in self.trials if not self.ledger.has_ended(key)]

    # What the command would do

    def preview(self) -> str:
        """Trials, resources and the time left; starts nothing and writes nothing."""
        lines = [f"{self.sweep.name}: {len(self.trials)} trials, {len(self.todo())} to do", *self._noted()]
        lines += [f"  {self.ledger.of(key).state:<12} {trial.label}" for key, trial in self.trials.items()]
        slots, resources = self._expected()
        seconds = self._estimate(slots)
        left = "unknown until a trial has finished"
        if seconds is not None:
            left = f"about {duration(seconds)}, from what finished trials took"
        return "\n".join([*lines, f"resources: {resources}", f"time left: {left}"])

    def _noted(self) -> list[str]:
        return [self.note] if self.note else []

    def _expected(self) -> tuple[int, str]:
        """Trials at a time, and in words; a cluster that runs elsewhere is not asked."""
        if self.cluster.workers == 0:
            return 1, "this process, one trial after the other"
        if self.cluster.ray_address is not None:
            room = f"as many trials at a time as {self.cluster.ray_address} has room for"
            return self.sweep.concurrent or 1, room
        shares = self._shares(this_machine())
        return shares.slots, str(shares)

    def _estimate(self, slots: int) -> float | None:
        """Seconds, from what finished trials took; None where none has finished."""
        ranked = leaderboard.rank_trials(self.sweep, list(self.trials.values()), self.ledger)
        took = [row.seconds for row in ranked.rows if row.state == "finished" and row.seconds]
        return math.ceil(len(self.todo()) / slots) * sum(took) / len(took) if took else None

    def _shares(self, nodes: list[Node]) -> Share:
        return share(self.cluster, nodes, max(1, len(self.todo())), self.sweep.concurrent)

    # Doing it

    def run(self) -> None:
        """Bring every trial up to date. A trial that fails raises nothing. Raises Interrupted, PipelineError."""
        uri = self.cluster.tracking_uri or tracking.default_uri(self.root)
        if self.cluster.tracking_uri:
            tracking.check(uri)
        with exclusive(self.folder):
            self.interrupt.stop_file.unlink(missing_ok=True)
            self.ledger = self._judged_ledger()
            self.board = board = Board(
                self.sweep, self.trials, self.ledger, self.folder, uri, self.interrupt.requested, self.note
            )
            todo, total = self.todo(), len(self.trials)
            say(f"{self.sweep.name}: {total} trials, {total - len(todo)} done, {len(todo)} to do")
            for line in self._noted():
                say(line)
            board.open()
            status = "KILLED"
            try:
                if todo:
                    self._work(board, todo)
                status = "FINISHED"
            except PipelineError:
                status = "FAILED"
                raise
            finally:
                self.standings = board.close(status)
                shutil.rmtree(self.folder / "ray", ignore_errors=True)

    def _work(self, board: Board, todo: list[str]) -> None:
        with self.interrupt, ExitStack() as stack:
            executor, shares = self._start(stack)
            try:
                orders = {key: self._order(key, shares) for key in self._prepare(executor, board, todo)}
                done, _ = board.progress()
                with (
                    bar(self.sweep.name, len(self.trials), "trials", done) as shown,
                    following(lambda: shown.update(*board.progress())),
                ):
                    self._carry_out(orders, executor, shares, board)
            finally:
                for key in list(board.mirrors):  # this driver is on its way out, and they with it
                    board.ended(key, None)
            if self.interrupt.requested():
                raise Interrupted

    def _start(self, stack: ExitStack) -> tuple[Executor, Share]:
        """Who does the work, and what each trial may use of it."""
        executor = stages.start_executor(self.cluster, self.interrupt, stack)
        if isinstance(executor, InProcess):
            alone = replace(self.cluster, workers=1, cpus_per_worker=1)
            return executor, share(alone, this_machine(), 1, 1)
        shares = self._shares([Node(*counts) for counts in executor.nodes()])
        say(f"{self.sweep.name}: {shares}")
        return executor, shares

    def _order(self, key: str, shares: Share) -> Order:
        trial, stop = self.trials[key], self.sweep.early_stop
        rungs = tuple(stop.rungs(trial.experiment.train.steps)) if stop.first else ()
        return Order(
            trial.experiment, trial.run, self.cluster, shares.resources, self.interrupt.stop_file,
            rungs, stop.nll_images,
        )  # fmt: skip

    def _prepare(self, executor: Executor, board: Board, todo: list[str]) -> list[str]:
        """Make what trials share before they would all make it; returns those that can go on from there."""
        made: set[Any] = set()
        able = []
        for key in todo:
            trial = self.trials[key]
            experiment, run = trial.experiment, trial.run
            try:
                if run.data not in made:
                    stages.execute_within(
                        executor, self.interrupt.requested, experiment, self.cluster, run, "shard"
                    )
                evaluate.check(experiment, run)
                features = (run.data, experiment.evaluate.features)
                if features not in made and evaluate.needs_samples(experiment):
                    self._prepare_features(executor, missing_preparations(run.of(experiment)))
                made |= {run.data, features}
                able.append(key)
            except PipelineError as error:
                board.started(key)
                board.ended(key, " ".join(str(error).split()))
            if self.interrupt.requested():
                raise Interrupted
        return able

    def _prepare_features(self, executor: Executor, units: list[Unit]) -> None:
        if units:
            say(
                f"{self.sweep.name}: making {' and '.join(unit.name for unit in units)}, which all trials share"
            )
        executor.map_units(units, lambda unit: None)

    def _carry_out(self, orders: dict[str, Order], executor: Executor, shares: Share, board: Board) -> None:
        scheduler = self._judge(orders)
        if self.cluster.workers == 0:
            for key, order in orders.items():
                if not board.closed():
                    self._in_process(key, order, executor, scheduler, board)
        elif orders:
            from pipeline.sweep.tuning import run_trials

            run_trials(orders, shares.slots, board, scheduler, self.folder / "ray")

    def _judge(self, orders: dict[str, Order]) -> Any:
        """Who stops trials early; None where nobody does."""
        if not self.sweep.early_stop.first:
            return None
        from pipeline.sweep.tuning import Rungs

        steps = max(trial.experiment.train.steps for trial in self.trials.values())
        return Rungs(self.sweep, steps, self.ledger, [key for key in self.trials if key not in orders])

    def _in_process(self, key: str, order: Order, executor: Executor, scheduler: Any, board: Board) -> None:
        """Without Ray: the same work and the same judge."""
        goes_on: Callable[[int, float], bool] = _always
        if scheduler is not None:
            from pipeline.sweep.tuning import by_hand

            goes_on = by_hand(scheduler, key)
        board.started(key)
        error = None
        try:
            carry_out(order, executor, goes_on)
        except Interrupted:
            pass
        except Exception as failure:  # whatever it is, the other trials do not suffer from it
            error = " ".join(str(failure).split()) or type(failure).__name__
        board.ended(key, error)

    # What the command ends with

    def shown(self) -> str:
        width = max(100, shutil.get_terminal_size().columns)
        return leaderboard.to_text(self.standings, width)

    def left(self) -> str:
        """What the budget did not allow; nothing where it sufficed."""
        never = [row for row in self.standings.rows if row.state in ("new", "interrupted")]
        hours = self.sweep.budget.hours
        if not never or hours is None:
            return ""
        return f"budget.hours={hours:g} is spent, {len(never)} trials are left; the same command goes on"

    def failures(self) -> list[str]:
        return leaderboard.failures(self.standings)

    def whereabouts(self) -> list[tuple[str, str]]:
        by, report = self.sweep.rank.by, self.folder / "report" / "report.html"
        metric = "train/loss" if by.name == LOSS.name else f"eval/{by.name}"
        found = [("leaderboard", str(self.folder / "leaderboard.md"))]
        found += self.board.parent.links(metric, by.larger_is_better)
        return [*found, ("report", str(report))] if report.exists() else found


def reproduction(
    target: str, text: str, shared: list[str], cluster: ClusterConfig, dry_run: bool = False
) -> Study:
    """The rows of the paper's tables as one study, of the length that `--budget` says.

    Where that is a time, the rate of training is measured once, unless this is a dry run. Raises ConfigError,
    PipelineError.
    """
    asked = budget.Budget.parse(text)
    sweep = load_sweep(budget.STUDIES[target], [])
    rows = [point.experiment for point in points(sweep, shared)]
    name = f"reproduce_{target}" + ("" if text == "full" else f"-{text}")
    sweep, steps = replace(sweep, name=name), asked.steps or rows[0].train.steps
    if asked.hours is not None:
        hours, folder = asked.hours, stages.storage_root(cluster) / "sweeps" / name
        if dry_run and not budget.is_remembered(folder):
            later = f"how many steps of {steps:,} fit into {text} is measured at the start"
            return Study(sweep, points(sweep, shared), cluster, later)

        def measure() -> int:
            say("measuring how fast this cluster trains")
            rate = budget.measured_rate(stages.execute(budget.probe(rows[0]), cluster, "train"))
            return budget.steps_for(hours, rate, rows)

        steps = budget.remembered(folder, measure)
    scaled = [*budget.overrides(steps, rows[0]), *shared]
    return Study(sweep, points(sweep, scaled), cluster, budget.said(steps, rows[0]))


def _always(step: int, bound: float) -> bool:
    return True
