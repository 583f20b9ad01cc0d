"""The loop: collect, train, log, evaluate, save; and again until the steps are spent."""

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax import replay as replay_lib
from jedi_jax.agent import Agent
from jedi_jax.config import Config, Updates
from jedi_jax.errors import TrainingError, UserError
from jedi_jax.evaluation import EpisodeResult
from jedi_jax.evaluation.evaluate import describe_results, evaluate
from jedi_jax.models.variants import build, count_parameters, with_num_actions
from jedi_jax.runs import checkpoint, telemetry, workdir
from jedi_jax.runs.console import Console
from jedi_jax.runs.interruption import Interruption
from jedi_jax.training import dreams, hosts, seeds
from jedi_jax.training.acting import Actor, side_by_side
from jedi_jax.training.collector import Collected, Collector
from jedi_jax.training.hosts import Operation
from jedi_jax.training.memory import check_replay, empty_replay
from jedi_jax.training.parallel import Devices
from jedi_jax.training.programs import make_programs, traced
from jedi_jax.training.seeds import Purpose
from jedi_jax.training.state import make_init
from jedi_jax.types import EnvSpec

_POLL = 0.1  # Seconds between two looks at what threads do.
_FOLLOWERS_MARGIN = 60.0  # Seconds beyond the grace in which the first process may finish what it writes.


class Progress(NamedTuple):
  """Where a run stands; saved with every checkpoint.

  Attributes:
    epoch: epochs done.
    total_epochs: epochs in all; known after the first collection.
    seconds: wall time of epochs and evaluations so far, resumed or not; without the epoch's compilation and
      without saving.
    best: best mean return of an evaluation during training, -inf before the first.
  """

  epoch: int
  total_epochs: int
  seconds: float
  best: float


def train(
  config: Config,
  directory: str | os.PathLike[str],
  *,
  overwrite: bool = False,
  devices: Devices | None = None,
  console: Console | None = None,
  interruption: Interruption | None = None,
) -> dict[str, Any]:
  """Trains a run to its end, or continues it from its latest checkpoint.

  Args:
    config: the configuration.
    directory: the run's working directory.
    overwrite: starts anew in a directory that holds a run.
    devices: on which to train; all if None. They may be those of several processes that `jax.distributed` has
      connected, each of which calls this alike; the first one has the environments and the files.
    console: where progress is printed; standard output if None.
    interruption: what may tell the run to stop; nothing if None.

  Returns:
    What result.json holds; nothing in a process that is not the first.

  Raises:
    UserError: for what the user can mend; a mistake in what is asked overwrites nothing.
    TrainingError: if losses or gradients were not finite in too many updates in a row.
    Interrupted: if the run was told to stop.
  """
  return train_packed(
    [config], [directory], overwrite=overwrite, devices=devices, console=console, interruption=interruption
  )[0]


def train_packed(
  configs: Sequence[Config],
  directories: Sequence[str | os.PathLike[str]],
  *,
  overwrite: bool = False,
  devices: Devices | None = None,
  console: Console | None = None,
  interruption: Interruption | None = None,
) -> list[dict[str, Any]]:
  """Trains several runs in one program, each as it would train alone, or continues them.

  Finished runs are left as they are. Runs whose checkpoints stand at different epochs are trained one group after the
  other.

  Args:
    configs: one configuration a run; they differ in the seed and the game alone. Games with different numbers of
      actions need the same `env.action_slots`.
    directories: the runs' working directories, all different.
    overwrite: starts anew in directories that hold a run.
    devices: on which to train; all if None. Several runs are spread over them, which must be of one process.
    console: where progress is printed; standard output if None.
    interruption: what may tell the runs to stop; nothing if None.

  Returns:
    What each result.json holds.

  Raises:
    UserError: for what the user can mend; a mistake in what is asked overwrites nothing.
    TrainingError: if the losses or gradients of a run were not finite in too many updates in a row. The others are
      trained to their ends first.
    Interrupted: if the runs were told to stop.
  """
  devices = devices or Devices()
  console = console or Console()
  specs = [envs.spec(config.env.name) for config in configs]
  _check_pack(configs, directories, specs, devices)
  devices.with_runs(len(configs)).check_batch(configs[0].training.batch_size)
  for config, spec in zip(configs, specs, strict=True):
    # Before anything is written: they refuse what does not fit.
    Actor(config, spec)
    check_replay(config, spec)
  hosts.meet(devices)
  if devices.processes > 1 and jax.process_index() > 0:
    if interruption is not None:
      interruption.margin = _FOLLOWERS_MARGIN  # The leader says when it ends.
    hosts.follow(configs[0], specs[0], devices)
    if interruption is not None and interruption.asked:
      raise interruption.leave("with the first process")
    return [{}]
  with contextlib.ExitStack() as stack:
    leader = stack.enter_context(hosts.Leader(devices))  # First: the others are dismissed if a lock is refused.
    for directory, config, spec in zip(directories, configs, specs, strict=True):
      if not overwrite:
        workdir.check(directory, config, spec)  # Before the lock's file is made.
      stack.enter_context(workdir.locked(directory))
    return _lead(configs, directories, specs, overwrite, devices, leader, console, interruption or Interruption())


def _lead(
  configs: Sequence[Config],
  directories: Sequence[str | os.PathLike[str]],
  specs: Sequence[EnvSpec],
  overwrite: bool,
  devices: Devices,
  leader: hosts.Leader,
  console: Console,
  interruption: Interruption,
) -> list[dict[str, Any]]:
  """Trains runs that have been checked, in the process that has their files; see `train_packed`."""
  runs = [
    workdir.prepare(directory, config, spec, overwrite=overwrite)
    for directory, config, spec in zip(directories, configs, specs, strict=True)
  ]
  left = []
  for run in runs:
    if run.result.exists():
      console.log(f"{run.path} is complete; --overwrite starts it anew")
    else:
      left.append(run)
  failures: list[str] = []
  while left:
    numbers = [checkpoint.newest(run.checkpoints / "latest") or 0 for run in left]
    group = [run for run, number in zip(left, numbers, strict=True) if number == min(numbers)]
    try:
      trainer = Trainer(group, devices.with_runs(len(group)), leader, console, interruption)
    except _UnevenError:  # What was damaged is set aside now, and the runs stand where their files say.
      continue
    try:
      trainer.run_to_end()
    except TrainingError as error:
      failures.append(str(error))
    finally:
      trainer.close()
    left = [run for run in left if run not in group]
  if failures:
    raise TrainingError("; ".join(failures))
  return [workdir.read_json(run.result) for run in runs]


class _UnevenError(Exception):
  """Runs of a group stand at different epochs, since the newest checkpoints of some were damaged."""


def _check_pack(
  configs: Sequence[Config],
  directories: Sequence[str | os.PathLike[str]],
  specs: Sequence[EnvSpec],
  devices: Devices,
) -> None:
  """Refuses runs that cannot share a program."""
  if len(configs) > 1 and devices.processes > 1:
    raise UserError("several runs share no program over connected processes: give each process runs of its own")
  if len({os.path.abspath(directory) for directory in directories}) < len(configs):
    raise UserError("two runs have the same directory: give each its own")
  same = {"seed": 0, "env.name": configs[0].env.name}
  slots = {config.env.action_slots or spec.num_actions for config, spec in zip(configs, specs, strict=True)}
  for config in configs[1:]:
    different = config_lib.differences(config_lib.override(configs[0], same), config_lib.override(config, same))
    if different:
      raise UserError(f"packed runs differ in seed and game alone, not in {'; '.join(different)}")
  if len({spec.observation_shape for spec in specs}) > 1:
    raise UserError("packed games must have observations of one shape")
  if len(slots) > 1:
    most = max(spec.num_actions for spec in specs)
    raise UserError(f"packed games have different numbers of actions: give room with --set=env.action_slots={most}")


class _Steps(NamedTuple):
  """The real steps of one epoch of a run: for replay, for its records, and the seconds that they took."""

  chunks: list[replay_lib.Chunk]
  collected: Collected
  seconds: float


class _Run:
  """What one run has on the host: files, environments, and where it stands.

  Args:
    run: its directory and configuration.
    actor: its policy, which all runs share.
  """

  def __init__(self, run: workdir.Workdir, actor: Actor):
    config = run.config
    self.workdir, self.config, self.spec, self._actor = run, config, run.spec, actor
    self.env = envs.make(
      config.env.name,
      num_envs=config.env.num_envs,
      seed=seeds.env_seed(config.seed, Purpose.COLLECTION),
      life_loss_ends=config.env.life_loss_ends,
      max_episode_steps=config.env.max_episode_steps,
    )
    with actor.near():
      self.collector = Collector(
        self.env,
        actor.act,
        initial_state=actor.model.initial_state(self.env.num_envs),
        seed=seeds.derive(config.seed, Purpose.COLLECTION),
        epsilon=config.collect.epsilon,
        max_calls=config.collect.total_steps // self.env.num_envs,
      )
    self.latest = checkpoint.Checkpoints(run.checkpoints / "latest", keep=config.checkpoint.keep)
    self.best = checkpoint.Checkpoints(run.checkpoints / "best", keep=1)
    self.progress = Progress(epoch=0, total_epochs=0, seconds=0.0, best=-math.inf)
    self.metrics: telemetry.MetricsWriter | None = None
    self.failure = ""  # Why it cannot go on.
    self.saved: int | None = None  # Its newest checkpoint.
    self.collapsed = False

  @property
  def done(self) -> bool:
    """Whether its last epoch has been trained, or none can be."""
    return bool(self.failure) or 0 < self.progress.total_epochs <= self.progress.epoch

  def begin(self) -> None:
    """Opens the metrics, which forget what is after the epoch that the run stands at."""
    self.metrics = telemetry.MetricsWriter(
      self.workdir.metrics, self.workdir.tensorboard, last_epoch=self.progress.epoch
    )

  def close(self) -> None:
    """Finishes what is being written and frees the environments."""
    self.latest.close()
    self.best.close()
    if self.metrics is not None:
      self.metrics.close()
    self.env.close()

  def repeat(self, log: Mapping[str, Any], check: Callable[[], None]) -> None:
    """Takes the steps of a collector's log again; `check` is called after each."""
    self.collector.restore(log, check)

  def collect(self, params: Any, check: Callable[[], None]) -> _Steps:
    """Takes the real steps of the next epoch by picked parameters; `check` is called after each."""
    start = time.monotonic()
    chunks, collected = self._collect_epoch(self._actor.bring(params), check)
    return _Steps(chunks, collected, time.monotonic() - start)

  def _collect_epoch(self, params: Any, check: Callable[[], None]) -> tuple[list[replay_lib.Chunk], Collected]:
    if self.progress.epoch:
      return self._collect(params, self.config.collect.steps_per_epoch, check)
    c = self.config.collect
    chunks, collected = self._collect(params, c.first_epoch_min_steps, check)
    # Until enough rewards of the two rarer signs were seen, within the configured bounds.
    while collected.steps < c.first_epoch_max_steps and _rarer_rewards(collected) < c.first_epoch_rewards:
      steps = min(c.steps_per_epoch, c.first_epoch_max_steps - collected.steps)
      more_chunks, more = self._collect(params, steps, check)
      chunks += more_chunks
      collected = Collected(
        collected.steps + more.steps,
        collected.returns + more.returns,
        collected.lengths + more.lengths,
        tuple(a + b for a, b in zip(collected.reward_counts, more.reward_counts, strict=True)),  # type: ignore[arg-type]
      )
    return chunks, collected

  def _collect(self, params: Any, steps: int, check: Callable[[], None]) -> tuple[list[replay_lib.Chunk], Collected]:
    """Takes up to `steps` real steps, fewer when the run's total is reached."""
    steps = min(steps, self.config.collect.total_steps - self.collector.env_steps)
    if steps <= 0 or self.done:
      return [], Collected(0, [], [], (0, 0, 0))
    return self.collector.collect(params, [], lambda chunks, chunk: [*chunks, chunk], steps, check)

  def count_epochs(self) -> None:
    """Knows after the first collection how many epochs there will be."""
    c = self.config
    left = c.collect.total_steps - self.collector.env_steps
    total = 1 + math.ceil(left / c.collect.steps_per_epoch) + c.training.final_epochs
    self.progress = self.progress._replace(total_epochs=total)

  def describe_collection(self, steps: _Steps) -> dict[str, Any]:
    """Returns the epoch's figures of real steps."""
    collected, seconds = steps.collected, steps.seconds
    values: dict[str, Any] = {"env_steps": self.collector.env_steps, "frames": self.env.frames}
    values["time/collect_seconds"] = seconds
    if collected.steps:
      values["collect/steps"] = collected.steps
      values["collect/steps_per_second"] = collected.steps / max(seconds, 1e-9)
      values["collect/episodes"] = len(collected.returns)
      for sign, count in zip(("negative", "zero", "positive"), collected.reward_counts, strict=True):
        values[f"collect/rewards_{sign}"] = count
    if collected.returns:
      values["collect/return"] = float(np.mean(collected.returns))
      values["collect/length"] = float(np.mean(collected.lengths))
    return values


class Trainer:
  """Runs that train together in this process.

  Args:
    runs: their directories and configurations, which differ in seed and game alone; all at the same epoch.
    devices: on which to train, for so many runs.
    leader: tells other processes what to do.
    console: where progress is printed.
    interruption: what may tell the runs to stop.
  """

  def __init__(
    self,
    runs: Sequence[workdir.Workdir],
    devices: Devices,
    leader: hosts.Leader,
    console: Console,
    interruption: Interruption,
  ):
    self._devices, self._leader, self._console, self._interruption = devices, leader, console, interruption
    config, spec = runs[0].config, runs[0].spec
    self._config = config  # What it says of seed and game is the first run's.
    self._model, self._optimizers, self._epoch, self._add, self._strips = make_programs(config, spec, devices)
    self._actor = Actor(config, spec)
    self._evaluator = Agent(build(config, spec), {}, config)
    self._runs: list[_Run] = []
    try:
      for run in runs:
        self._runs.append(_Run(run, self._actor))
      self._begin()
    except BaseException:
      self.close()
      raise

  def _begin(self) -> None:
    """Makes or restores the state of every run."""
    init = jax.jit(make_init(self._model, self._optimizers))
    shapes = jax.eval_shape(init, jax.random.key(0))
    empty = functools.cache(lambda: jax.device_get(empty_replay(self._config, self._runs[0].spec)))
    states, replays, logs = [], [], []
    for run in self._runs:
      restored = self._restore(run, shapes)
      if restored is None:
        state = jax.device_get(init(jax.random.key(seeds.derive(run.config.seed, Purpose.TRAINING))))
        states.append(state.replace(params=with_num_actions(state.params, run.spec.num_actions)))
        replays.append(empty())
      else:
        states.append(restored[0])
        replays.append(restored[1])
        logs.append((run, restored[2]))
    if len({run.progress.epoch for run in self._runs}) > 1:
      raise _UnevenError
    with side_by_side([functools.partial(run.repeat, log) for run, log in logs]) as futures:
      self._wait(futures, "repeating environment steps", sum(int(log["calls"]) * run.env.num_envs for run, log in logs))
    for run in self._runs:
      if run.progress.epoch:
        run.best.forget_after(run.progress.epoch)
      run.begin()
    with self._leader.doing(Operation.BEGIN):
      self._state = self._devices.distribute(states)
      self._replay = self._devices.distribute(replays)

  def close(self) -> None:
    """Finishes what is being written and frees the environments."""
    self._interruption.finish()
    for run in self._runs:
      self._written(run)
      run.close()

  def run_to_end(self) -> None:
    """Runs the epochs that are left; each run that ends is evaluated and writes result.json.

    Raises:
      TrainingError: if a run could not go on; at the end, when the others are done.
      Interrupted: if the runs were told to stop.
    """
    self._describe()
    self._compile()
    config = self._config
    for index, run in enumerate(self._runs):
      if run.done:  # It was stopped while its last games were played.
        self._finish(index)
    while not all(run.done for run in self._runs):
      start = time.monotonic()
      going = [index for index, run in enumerate(self._runs) if not run.done]
      values = self._run_epoch()
      going = [index for index in going if not self._runs[index].failure]
      if not going:
        break
      epoch = self._runs[going[0]].progress.epoch
      if config.evaluation.interval_epochs and epoch % config.evaluation.interval_epochs == 0:
        for index in going:
          values[index] |= self._evaluate_and_keep_best(index)
        self._show_dreams(going)
      seconds = time.monotonic() - start
      for index in going:
        run = self._runs[index]
        run.progress = run.progress._replace(seconds=run.progress.seconds + seconds)
        values[index]["time/total_seconds"] = run.progress.seconds
        assert run.metrics is not None
        run.metrics.write(epoch, values[index])
      self._console.log(self._epoch_line([values[index] for index in going], going))
      for index in going:
        self._warn_of_collapse(index, values[index])
      asked = self._interruption.asked
      # Left before the last save, which takes its time.
      stopped = self._interruption.leave(f"after epoch {epoch}") if asked else None
      for index in going:
        if epoch % config.checkpoint.interval_epochs == 0 or self._runs[index].done or asked:
          self._save(index)
      if stopped:
        raise stopped
      for index in going:
        if self._runs[index].done:
          self._finish(index)
    failures = [run.failure for run in self._runs if run.failure]
    if failures:
      raise TrainingError("; ".join(failures))

  def _describe(self) -> None:
    counts = count_parameters(jax.eval_shape(self._model.init, jax.random.key(0)))
    c, first = self._config, self._runs[0]
    what = f"{c.env.name}, variant {c.variant}, preset {c.preset}, seed {c.seed}"
    if self._devices.packed:
      games = dict.fromkeys(run.config.env.name for run in self._runs)
      what = f"{len(self._runs)} runs of {', '.join(games)}, variant {c.variant}, preset {c.preset}"
    platform = self._devices.devices[0].platform
    where = os.path.commonpath([run.workdir.path for run in self._runs]) if self._devices.packed else first.workdir.path
    self._console.log(f"{what}, {self._devices.count} {platform} device(s), in {where}")
    shares = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    self._console.log(f"parameters: {shares}, in all {sum(counts.values()):,}; latent {self._model.latent_shape}")

  def _compile(self) -> None:
    self._console.log("compiling the epoch (the result is cached on disk) ...")
    start = time.monotonic()
    nothing = traced(dict.fromkeys(self._counts(self._config.training.updates), 0))
    self._epoch = self._epoch.lower(self._state, self._replay, nothing).compile()
    self._console.log(f"compiled in {time.monotonic() - start:.1f} s")

  def _run_epoch(self) -> list[dict[str, Any]]:
    """Collects and trains; returns the epoch's figures of each run."""
    training = self._config.training
    start = time.monotonic()
    first = not any(run.progress.epoch for run in self._runs)
    epoch = max(run.progress.epoch for run in self._runs) + 1
    counts = self._counts(training.first_updates if first else training.updates)
    split = epoch % training.time_phases_every == 0
    tasks = [
      functools.partial(run.collect, self._actor.pick(self._devices, self._state.params, index))
      for index, run in enumerate(self._runs)
    ]
    with side_by_side(tasks) as futures:
      if self._config.collect.overlap and not first:  # At first there is nothing to train on.
        figures = self._update(counts, epoch, split=split)
        steps = self._add_steps(futures)
      else:
        steps = self._add_steps(futures)
        figures = self._update(counts, epoch, split=split)
    seconds = time.monotonic() - start
    values = []
    for run, own, learned in zip(self._runs, steps, figures, strict=True):
      if first:
        run.count_epochs()
      if not run.done:
        run.progress = run.progress._replace(epoch=epoch)
      values.append({**run.describe_collection(own), **learned, "time/epoch_seconds": seconds})
    return values

  def _add_steps(self, futures: Sequence[Future[_Steps]]) -> list[_Steps]:
    """Waits for every run's real steps, and adds them to replay."""
    self._wait(futures, "collecting, environment steps", len(futures) * self._config.collect.total_steps)
    steps = [future.result() for future in futures]
    for parts in itertools.zip_longest(*(own.chunks for own in steps)):
      like = next(part for part in parts if part is not None)
      nothing = jax.tree.map(np.zeros_like, like)
      with self._leader.doing(Operation.ADD):
        self._replay = self._add(self._replay, self._devices.distribute([part or nothing for part in parts]))
    return steps

  def _wait(self, futures: Sequence[Future[Any]], task: str, total: int) -> None:
    """Waits for environment steps that are being taken, tells how many there are, and stops when it is time to."""
    left: set[Future[Any]] = set(futures)
    while left:
      self._console.show(task, sum(run.collector.env_steps for run in self._runs), total)
      self._interruption.check()
      done, left = wait(left, timeout=_POLL, return_when=FIRST_EXCEPTION)
      for future in done:
        future.result()  # Raises what ended it.

  def _counts(self, updates: Updates) -> dict[str, int]:
    """Returns the number of updates of each phase that the model has, in order."""
    return {phase.name: getattr(updates, phase.name) for phase in self._model.phases}

  def _update(self, counts: Mapping[str, int], epoch: int, *, split: bool) -> list[dict[str, float]]:
    """Runs one epoch's updates; returns each run's mean metrics, and seconds and rates."""
    total = sum(counts.values())
    sums: Any = None
    seconds = dict.fromkeys(counts, 0.0)
    fused_seconds, done = 0.0, 0
    for call in plan_calls(counts, limit=self._config.training.updates_per_call, split=split):
      start = time.monotonic()
      with self._leader.doing(Operation.EPOCH, call):
        self._state, result = self._epoch(self._state, self._replay, traced(call))
        result = [self._devices.to_host(result, index) for index in range(len(self._runs))]
      elapsed = time.monotonic() - start
      phases = [name for name, count in call.items() if count]
      if len(phases) == 1:
        seconds[phases[0]] += elapsed
      fused_seconds += elapsed
      sums = result if sums is None else jax.tree.map(np.add, sums, result)
      done += sum(call.values())
      self._stop_failing()
      self._interruption.check()
      self._console.show(f"epoch {epoch}, updates", done, total, f"({' and '.join(phases)})")
    timing = {
      "time/update_seconds": fused_seconds,
      "time/updates_per_second": total / max(fused_seconds, 1e-9),
    }
    for name, spent in seconds.items():
      if spent > 0:
        timing[f"time/{name}_seconds"] = spent
        timing[f"time/{name}_updates_per_second"] = counts[name] / spent
    return [
      {
        **telemetry.summarise(own, counts),
        **{f"updates/{name}": count for name, count in self._updates_done(index).items()},
        **timing,
      }
      for index, own in enumerate(sums)
    ]

  def _stop_failing(self) -> None:
    """Ends the runs of which too many updates in a row were skipped."""
    for index, run in enumerate(self._runs):
      skipped = self._devices.to_host(self._state.skipped, index)
      for name, count in skipped.items():
        if count > self._config.training.max_skipped and not run.done:
          self._written(run)
          saved = "no checkpoint" if run.saved is None else f"checkpoint {run.saved}"
          run.failure = (
            f"{run.workdir.path}: the loss or gradient of {name} was not finite in {count} updates in a row, in epoch "
            f"{run.progress.epoch + 1}; {saved} was saved before: the same command tries again from there; else start "
            f"anew (--overwrite) with a lower {name}.optimizer.learning_rate or max_grad_norm"
          )
          self._console.log(run.failure)

  def _warn_of_collapse(self, index: int, values: Mapping[str, Any]) -> None:
    """Tells when latents have collapsed, and when they have recovered."""
    run, bounds = self._runs[index], self._config.training
    std, rank = (values.get(f"denoiser/latent_{name}") for name in ("std", "rank"))
    if std is None or rank is None:
      return
    collapsed = not (std >= bounds.collapse_std and rank >= bounds.collapse_rank)  # So is what is no number.
    if collapsed != run.collapsed:
      place = f"{run.workdir.path}: " if self._devices.packed else ""
      what = "WARNING: the latents have collapsed" if collapsed else "the latents have recovered"
      self._console.log(f"{place}{what}: standard deviation {std:.3g}, effective rank {rank:.3g}")
    run.collapsed = collapsed

  def _show_dreams(self, going: Sequence[int]) -> None:
    """Writes the strips of real and imagined frames."""
    if self._strips is None:
      return
    keys = []
    for run in self._runs:
      key = jax.random.key(seeds.derive(run.config.seed, Purpose.DREAMS))
      keys.append(jax.random.key_data(jax.random.fold_in(key, run.progress.epoch)))
    with self._leader.doing(Operation.STRIPS):
      strips = self._strips(self._state.params, self._replay, self._devices.distribute(keys))
    for index in going:
      run = self._runs[index]
      assert run.metrics is not None
      image = dreams.tile(self._devices.to_host(strips, index))
      run.metrics.write_image(run.progress.epoch, "dreams/real_over_imagined", image)

  def _evaluate(self, index: int, *, episodes: int, purpose: Purpose) -> list[EpisodeResult]:
    run = self._runs[index]
    c = run.config.evaluation
    # Parameters on the device of the evaluator's program, wherever the run lies.
    self._evaluator.params = jax.device_put(self._devices.pick(self._state.params, index), self._devices.devices[0])
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
    run = self._runs[index]
    results = self._evaluate(index, episodes=self._config.evaluation.interval_episodes, purpose=Purpose.EVALUATION)
    mean = float(np.mean([result.return_ for result in results]))
    if mean > run.progress.best:
      with self._warned_of():
        run.best.save(run.progress.epoch, params=self._devices.to_host(self._state.params, index))
        run.best.wait()  # It is the best once it is written.
        run.progress = run.progress._replace(best=mean)
    return {
      "evaluation/return": mean,
      "evaluation/length": float(np.mean([result.length for result in results])),
      "time/evaluation_seconds": time.monotonic() - start,
    }

  def _finish(self, index: int) -> None:
    """The final evaluation of a run and its result.json."""
    start = time.monotonic()
    run = self._runs[index]
    c = run.config
    results = self._evaluate(index, episodes=c.evaluation.episodes, purpose=Purpose.FINAL)
    seconds = run.progress.seconds + time.monotonic() - start
    result = {
      "env": c.env.name,
      "variant": c.variant,
      "preset": c.preset,
      "seed": c.seed,
      "env_steps": run.collector.env_steps,
      "frames": run.env.frames,
      "updates": self._updates_done(index),
      **describe_results(c.env.name, results),
      "max_episode_steps": c.evaluation.max_episode_steps,
      "seconds": seconds,
      "runs_together": len(self._runs),
    }
    self._written(run)  # A run with a result has its last checkpoint.
    if run.latest.latest() != run.progress.epoch:  # There was no room for it before the games.
      self._write(index)
      run.latest.wait()
    workdir.write_json(run.workdir.result, result)
    score = result["human_normalized_score"]
    self._console.log(
      f"done: mean return {result['mean_return']:.2f} over {len(results)} games"
      + (f", human-normalised score {score:.3f}" if score is not None else "")
      + f", {seconds:.0f} s; {run.workdir.result}"
    )

  def _epoch_line(self, values: Sequence[Mapping[str, Any]], going: Sequence[int]) -> str:
    """One line an epoch; of several runs the means."""
    p = self._runs[going[0]].progress
    total = max(self._runs[index].progress.total_epochs for index in going)

    def mean(name: str) -> float | None:
      found = [one[name] for one in values if name in one]
      return float(np.mean(found)) if found else None

    steps, frames = (sum(one[name] for one in values) for name in ("env_steps", "frames"))
    parts = [f"epoch {p.epoch}/{total}", f"{steps:,} steps ({frames:,} frames)"]
    if self._devices.packed:
      parts.insert(1, f"{len(going)} runs")
    for label, name in (
      ("return", "collect/return"),
      ("evaluated", "evaluation/return"),
      ("denoiser", "denoiser/loss"),
      ("reward/end", "reward_end/loss"),
      ("imagined return", "actor_critic/imagined_return"),
      ("entropy", "actor_critic/policy_entropy"),
    ):
      value = mean(name)
      if value is not None:
        parts.append(f"{label} {value:.3g}")
    parts.append(f"{values[0]['time/updates_per_second'] * len(going):.1f} updates/s")
    if p.epoch > 1:
      parts.append(f"{(total - p.epoch) * values[0]['time/epoch_seconds'] / 60:.0f} min left")
    return ", ".join(parts)

  def _updates_done(self, index: int) -> dict[str, int]:
    return {name: int(count) for name, count in self._devices.to_host(self._state.updates, index).items()}

  def _save(self, index: int) -> None:
    """Saves a run, unless its newest updates were skipped; a failure is told, and the run goes on without."""
    run = self._runs[index]
    self._written(run)  # The one before.
    skipped = self._devices.to_host(self._state.skipped, index)
    later = self._counts(self._config.training.updates)  # A phase that only the first epoch has may end with skips.
    names = " and ".join(name for name, count in skipped.items() if count and later[name])
    if names and not run.done:
      self._console.log(f"epoch {run.progress.epoch} is not saved: the last updates of {names} were not finite")
      return
    with self._warned_of():
      self._write(index)

  @contextlib.contextmanager
  def _warned_of(self) -> Iterator[None]:
    """A context in which a checkpoint that cannot be written is told of, and nothing more."""
    try:
      yield
    except checkpoint.SaveError as error:
      self._console.log(f"WARNING: {error}")

  def _written(self, run: _Run) -> None:
    """Waits until what is being saved of a run is written, and tells of it if it cannot be."""
    for checkpoints in (run.latest, run.best):
      with self._warned_of():
        checkpoints.wait()
    run.saved = run.latest.latest()  # Not what was begun, but what is there.

  def _write(self, index: int) -> None:
    """Starts writing a run's checkpoint."""
    run = self._runs[index]
    state = self._devices.to_host(self._state, index)
    run.latest.save(
      run.progress.epoch,
      params=state.params,
      state={
        "train": state.replace(params={}),
        "replay": self._devices.to_host(self._replay, index),
        "collector": run.collector.save(),
        "progress": {name: np.asarray(value, np.float64) for name, value in run.progress._asdict().items()},
      },
    )

  def _restore(self, run: _Run, shapes: Any) -> tuple[Any, Any, Any] | None:
    """Reads a run's newest whole checkpoint, to continue from it.

    Returns:
      Its state, its replay and the log of its collector; None where there is no checkpoint.
    """
    empty = jax.eval_shape(lambda: empty_replay(run.config, run.spec))
    target = {
      "train": shapes.replace(params={}),
      "replay": empty,
      "collector": run.collector.save(),
      "progress": {name: np.zeros((), np.float64) for name in Progress._fields},
    }
    restored = run.latest.restore_newest(params=shapes.params, state=target, log=self._console.log)
    if restored is None:
      return None
    run.saved, params, saved = restored
    p = saved["progress"]
    run.progress = Progress(int(p["epoch"]), int(p["total_epochs"]), float(p["seconds"]), float(p["best"]))
    log = saved["collector"]
    steps = int(log["calls"]) * run.env.num_envs
    self._console.log(f"resuming after epoch {run.progress.epoch}: repeating {steps:,} environment steps")
    return saved["train"].replace(params=params), saved["replay"], log


def plan_calls(counts: Mapping[str, int], *, limit: int, split: bool) -> Iterator[dict[str, int]]:
  """Yields the device calls of an epoch, each as updates by phase.

  Args:
    counts: the epoch's updates by phase, in order.
    limit: updates of one call at most.
    split: whether every phase is a call of its own, however few its updates.
  """
  if sum(counts.values()) <= limit and not split:
    yield dict(counts)
    return
  nothing = dict.fromkeys(counts, 0)
  for name, count in counts.items():
    for done in range(0, count, limit):
      yield {**nothing, name: min(count - done, limit)}


def _rarer_rewards(collected: Collected) -> int:
  return sum(sorted(collected.reward_counts)[:-1])
