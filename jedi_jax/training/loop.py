"""The training loop: the order of an epoch."""

import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

import jax
import numpy as np

from jedi_jax.agent import Agent
from jedi_jax.config import Updates
from jedi_jax.datasets import Dataset
from jedi_jax.errors import TrainingError
from jedi_jax.evaluation import EpisodeResult
from jedi_jax.evaluation.evaluate import describe_results, evaluate
from jedi_jax.models.base import Model
from jedi_jax.runs import telemetry, workdir
from jedi_jax.runs.console import Console
from jedi_jax.runs.interruption import Interruption
from jedi_jax.training import dreams, messages, saving, seeds
from jedi_jax.training.acting import Actor, run_in_threads
from jedi_jax.training.learner import Learner, empty_replay
from jedi_jax.training.run import Run, Steps
from jedi_jax.training.seeds import Purpose

OnEpoch = Callable[[pathlib.Path, Mapping[str, Any]], None]
"""(directory of the run, record of the epoch as metrics.jsonl has it) -> None."""

_POLL = 0.1  # Seconds between two checks of the threads that step environments.


class UnevenError(Exception):
  """Runs of a group are at different epochs, since damaged checkpoints were set aside; group them again."""


class Trainer:
  """Runs that train together in this process. As a context it finishes pending writes and frees the environments.

  Args:
    workdirs: of the runs, all at the same epoch; their configurations differ in the seed and the game only.
    learner: trains them.
    actor: chooses their actions.
    model: of one run, which is evaluated.
    console: where progress is printed.
    interruption: can stop the runs.
    on_epoch: see `train`.
    log: see `train`.
    data: recorded episodes in the place of environments; None for environments.

  Attributes:
    learner: trains the runs.
    runs: the runs on the host.
  """

  def __init__(
    self,
    workdirs: Sequence[workdir.Workdir],
    *,
    learner: Learner,
    actor: Actor,
    model: Model,
    console: Console,
    interruption: Interruption,
    on_epoch: OnEpoch | None,
    log: Sequence[str] = ("tensorboard",),
    data: Dataset | None = None,
  ):
    self.learner, self._actor, self._console, self._interruption = learner, actor, console, interruption
    self._on_epoch, self._loggers = on_epoch, log
    # Its seed and game are the first run's.
    self._config = workdirs[0].config
    self._evaluator = Agent(model, {}, self._config)
    self.runs: list[Run] = []
    try:
      for own in workdirs:
        self.runs.append(Run(own, actor, data))
      self._start()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "Trainer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Finishes pending writes and frees the environments."""
    self._interruption.exit_if_overdue()
    for run in self.runs:
      saving.wait(run, self._console)
      run.close()

  def _start(self) -> None:
    """Initialises or restores every run."""
    empty = functools.cache(lambda: jax.device_get(empty_replay(self._config, self.runs[0].spec)))
    states, replays, logs = [], [], []
    for run in self.runs:
      restored = saving.restore(run, self.learner, self._console)
      if restored is None:
        states.append(self.learner.init(run.config.seed, run.spec.num_actions))
        replays.append(empty())
      else:
        state, replay, log = restored
        states.append(state)
        replays.append(replay)
        logs.append((run, log))
    if len({run.progress.epoch for run in self.runs}) > 1:
      raise UnevenError
    steps = sum(int(log["calls"]) * run.env.num_envs for run, log in logs)
    with run_in_threads([functools.partial(run.collector.restore, log) for run, log in logs]) as futures:
      self._wait(futures, "repeating environment steps", steps)
    for (run, _), future in zip(logs, futures, strict=True):
      if not future.result():
        self._console.log(messages.new_games(run, packed=self.learner.devices.packed))
    for run in self.runs:
      run.best.delete_after(run.progress.epoch)
      if run.best.latest() is None:  # A later one had replaced it.
        run.progress = run.progress._replace(best=-math.inf)
      run.open_metrics(self._loggers)
    self.learner.start(states, replays)

  def run_to_end(self) -> None:
    """Trains the epochs that are left; each run that ends is evaluated and writes result.json.

    Raises:
      TrainingError: if a run could not continue; after the others have finished.
      Interrupted: if the runs were stopped.
    """
    for line in messages.header(self.runs, self.learner):
      self._console.log(line)
    self.compile()
    for index, run in enumerate(self.runs):
      # It was stopped during its final evaluation.
      if run.done:
        self._finish(index)
    while not all(run.done for run in self.runs):
      self.run_epoch()
    failures = [run.failure for run in self.runs if run.failure]
    if failures:
      raise TrainingError("; ".join(failures))

  def compile(self) -> None:
    """Compiles the epoch."""
    self._console.log("compiling the epoch ...")
    start = time.monotonic()
    self.learner.compile()
    self._console.log(f"compiled in {time.monotonic() - start:.1f} s")

  def run_epoch(self) -> None:
    """Runs one epoch: collects, trains, evaluates, logs, saves."""
    config = self._config
    start = time.monotonic()
    going = [index for index, run in enumerate(self.runs) if not run.done]
    values = self._collect_and_update()
    going = [index for index in going if not self.runs[index].failure]
    if not going:
      return
    runs = [self.runs[index] for index in going]
    epoch = runs[0].progress.epoch
    if config.evaluation.interval_epochs and epoch % config.evaluation.interval_epochs == 0:
      for index in going:
        if self.runs[index].data is None:
          values[index] |= self._evaluate_and_keep_best(index)
      self._watch(going, values)
    self._log(going, values, time.monotonic() - start)
    asked = self._interruption.stop_requested
    # Before the last save, which takes time.
    stopped = self._interruption.begin_exit(f"after epoch {epoch}") if asked else None
    for index, run in zip(going, runs, strict=True):
      if epoch % config.checkpoint.interval_epochs == 0 or run.done or asked:
        saving.save(run, index, self.learner, self._console)
    if stopped:
      raise stopped
    for index, run in zip(going, runs, strict=True):
      if run.done:
        self._finish(index)

  def _log(self, going: Sequence[int], values: Sequence[dict[str, Any]], seconds: float) -> None:
    """Writes the records of an epoch and prints its line."""
    runs, records = [self.runs[index] for index in going], []
    for index, run in zip(going, runs, strict=True):
      run.progress = run.progress._replace(seconds=run.progress.seconds + seconds)
      values[index]["time/total_seconds"] = run.progress.seconds
      records.append(run.metrics.write(run.progress.epoch, values[index]))
    self._console.log(messages.epoch(runs, [values[index] for index in going]))
    for index, run, record in zip(going, runs, records, strict=True):
      packed = self.learner.devices.packed
      if run.check_collapse(values[index]):
        self._console.log(messages.collapse(run, values[index], packed=packed))
      if run.check_movement(values[index]):
        self._console.log(messages.runaway(run, values[index], packed=packed))
      if self._on_epoch is not None:
        self._on_epoch(run.workdir.path, record)

  def _collect_and_update(self) -> list[dict[str, Any]]:
    """Collects and trains; returns the epoch's metrics of each run."""
    training = self._config.training
    start = time.monotonic()
    first = not any(run.progress.epoch for run in self.runs)
    epoch = max(run.progress.epoch for run in self.runs) + 1
    counts = self._counts(training.first_updates if first else training.updates)
    split = epoch % training.time_phases_every == 0
    tasks = [
      functools.partial(run.collect, self._actor.params(self.learner, index)) for index, run in enumerate(self.runs)
    ]
    with run_in_threads(tasks) as futures:
      # Before the first epoch there is nothing to train on.
      if self._config.collect.overlap and not first:
        metrics = self.update(counts, epoch, split=split)
        steps = self._add_steps(futures)
      else:
        steps = self._add_steps(futures)
        metrics = self.update(counts, epoch, split=split)
    seconds = time.monotonic() - start
    values = []
    for run, own, learned in zip(self.runs, steps, metrics, strict=True):
      if first:
        run.count_epochs()
      if not run.done:
        run.progress = run.progress._replace(epoch=epoch)
      values.append({**run.collection_metrics(own), **learned, "time/epoch_seconds": seconds})
    return values

  def _add_steps(self, futures: Sequence[Future[Steps]]) -> list[Steps]:
    """Waits for the environment steps of every run, and adds them to replay."""
    self._wait(futures, "collecting, environment steps", len(futures) * self._config.collect.total_steps)
    steps = [future.result() for future in futures]
    for chunks in itertools.zip_longest(*(own.chunks for own in steps)):
      self.learner.add(chunks)
    return steps

  def _wait(self, futures: Sequence[Future[Any]], task: str, total: int) -> None:
    """Waits for threads that step environments, shows their progress, and stops when the interruption demands it."""
    left: set[Future[Any]] = set(futures)
    while left:
      self._console.show(task, sum(run.collector.env_steps for run in self.runs), total)
      self._interruption.check()
      done, left = wait(left, timeout=_POLL, return_when=FIRST_EXCEPTION)
      for future in done:
        # Raises the exception of the thread.
        future.result()

  def _counts(self, updates: Updates) -> dict[str, int]:
    """Returns the number of updates of each phase of the model, in order."""
    return {name: getattr(updates, name) for name in self.learner.phases}

  def update(self, counts: Mapping[str, int], epoch: int, *, split: bool) -> list[dict[str, float]]:
    """Runs the updates of an epoch.

    Args:
      counts: updates by phase.
      epoch: number of the epoch.
      split: whether each group of phases is a call of its own, so that its time is known.

    Returns:
      Each run's mean metrics, seconds and rates.
    """
    total = sum(counts.values())
    sums: Any = None
    groups = self.learner.groups
    seconds = dict.fromkeys(groups, 0.0)
    update_seconds, done = 0.0, 0
    for call in plan_calls(counts, groups.values(), limit=self._config.training.updates_per_call, split=split):
      start = time.monotonic()
      result = self.learner.update(call)
      elapsed = time.monotonic() - start
      running = [group for group, names in groups.items() if call[names[0]]]
      if len(running) == 1:
        seconds[running[0]] += elapsed
      update_seconds += elapsed
      sums = result if sums is None else jax.tree.map(np.add, sums, result)
      done += sum(call.values())
      self._stop_failing()
      self._interruption.check()
      self._console.show(f"epoch {epoch}, updates", done, total, f"({' and '.join(running)})")
    timing = {
      "time/update_seconds": update_seconds,
      "time/updates_per_second": total / max(update_seconds, 1e-9),
    }
    for name, spent in seconds.items():
      if spent > 0:
        timing[f"time/{name}_seconds"] = spent
        timing[f"time/{name}_updates_per_second"] = counts[groups[name][0]] / spent
    return [
      {
        **telemetry.summarise(own, counts),
        **{f"updates/{name}": count for name, count in self.learner.updates(index).items()},
        **timing,
      }
      for index, own in enumerate(sums)
    ]

  def _stop_failing(self) -> None:
    """Ends the runs in which too many updates in a row were skipped."""
    for index, run in enumerate(self.runs):
      skipped = self.learner.skipped(index)
      # Of joint updates all: which of the losses it was is not known.
      names = [name for name, count in skipped.items() if count > self._config.training.max_skipped]
      if names and not run.done:
        saving.wait(run, self._console)
        run.failure = messages.not_finite(run, names, max(skipped.values()))
        self._console.log(run.failure)

  def _watch(self, going: Sequence[int], values: Sequence[dict[str, Any]]) -> None:
    """Adds the figures of the world model, and writes real and imagined frames to the loggers."""
    keys = []
    for run in self.runs:
      key = jax.random.key(seeds.derive(run.config.seed, Purpose.DREAMS))
      keys.append(jax.random.key_data(jax.random.fold_in(key, run.progress.epoch)))
    watched = self.learner.watch(keys)
    for index in going:
      run, figures = self.runs[index], watched[index]
      values[index] |= telemetry.world_model_summary(figures)
      if "strips" in figures:
        run.metrics.write_image(run.progress.epoch, "dreams/real_over_imagined", dreams.tile(figures["strips"]))

  def _evaluate(self, index: int, *, episodes: int, purpose: Purpose) -> list[EpisodeResult]:
    run = self.runs[index]
    c = run.config.evaluation
    # On the device of the evaluator's program, whichever device has the run.
    self._evaluator.params = jax.device_put(self.learner.params(index), self.learner.devices.devices[0])
    return evaluate(
      self._evaluator,
      run.config.env.name,
      episodes=episodes,
      num_envs=min(c.num_envs, episodes),
      seed=seeds.env_seed(run.config.seed, purpose, run.progress.epoch),
      max_episode_steps=c.max_episode_steps,
      console=self._console,
      on_step=self._interruption.check,
    )

  def _evaluate_and_keep_best(self, index: int) -> dict[str, float]:
    start = time.monotonic()
    run = self.runs[index]
    results = self._evaluate(index, episodes=self._config.evaluation.interval_episodes, purpose=Purpose.EVALUATION)
    mean = float(np.mean([result.return_ for result in results]))
    if mean > run.progress.best:
      saving.save_best(run, jax.device_get(self._evaluator.params), mean, self._console)
    return {
      "evaluation/return": mean,
      "evaluation/length": float(np.mean([result.length for result in results])),
      "time/evaluation_seconds": time.monotonic() - start,
    }

  def _finish(self, index: int) -> None:
    """Runs the final evaluation of a run, if it has an environment, and writes its result.json."""
    start = time.monotonic()
    run = self.runs[index]
    c = run.config
    about: dict[str, Any] = {"data": run.workdir.data}
    if run.data is None:
      results = self._evaluate(index, episodes=c.evaluation.episodes, purpose=Purpose.FINAL)
      about = {
        **describe_results(c.env.name, results),
        "max_episode_steps": c.evaluation.max_episode_steps,
      }
    seconds = run.progress.seconds + time.monotonic() - start
    result = {
      "env": c.env.name,
      "variant": c.variant,
      "preset": c.preset,
      "seed": c.seed,
      "env_steps": run.collector.env_steps,
      "frames": run.collector.frames,
      "updates": self.learner.updates(index),
      **about,
      "seconds": seconds,
      "runs_together": len(self.runs),
    }
    # A run with a result has its last checkpoint; an earlier save may have failed for lack of space.
    saving.wait(run, self._console)
    if run.saved != run.progress.epoch:
      saving.start_save(run, index, self.learner)
      run.latest.wait()
    workdir.write_json(run.workdir.result, result)
    self._console.log(messages.done(run, result))


def plan_calls(
  counts: Mapping[str, int], groups: Iterable[Sequence[str]], *, limit: int, split: bool
) -> Iterator[dict[str, int]]:
  """Yields the device calls of an epoch, each as updates by phase.

  Args:
    counts: the epoch's updates by phase, in order.
    groups: names of the phases that run together.
    limit: updates of one call at most, over all phases; a call has at least one round of its group.
    split: whether every group is a call of its own, however few its updates.
  """
  total = sum(counts.values())
  if not total or (total <= limit and not split):
    yield dict(counts)
    return
  nothing = dict.fromkeys(counts, 0)
  for names in groups:
    rounds = min(counts[name] for name in names)
    each = {name: counts[name] // max(rounds, 1) for name in names}
    most = max(limit // max(sum(each.values()), 1), 1)
    for done in range(0, rounds, most):
      yield nothing | {name: min(rounds - done, most) * count for name, count in each.items()}
