"""A run on the host: its files, its environments and how far it is."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jedi_jax import envs
from jedi_jax.config import CollectConfig
from jedi_jax.datasets import Dataset
from jedi_jax.replay import Chunk
from jedi_jax.runs import checkpoint, loggers, telemetry
from jedi_jax.runs.workdir import Workdir
from jedi_jax.training import seeds
from jedi_jax.training.acting import Actor
from jedi_jax.training.collector import Collected, Collector
from jedi_jax.training.recorded import Recorded
from jedi_jax.training.seeds import Purpose
from jedi_jax.types import VectorEnv


class Progress(NamedTuple):
  """How far a run is; part of every checkpoint.

  Attributes:
    epoch: epochs done.
    total_epochs: epochs in all; 0 before the first collection.
    seconds: wall time of epochs and evaluations since the first start, without compilation and saving.
    best: best mean return of an evaluation during training; -inf before the first.
  """

  epoch: int = 0
  total_epochs: int = 0
  seconds: float = 0.0
  best: float = -math.inf


class Steps(NamedTuple):
  """The environment steps of one epoch.

  Attributes:
    chunks: for replay.
    collected: for the metrics.
    seconds: wall time.
  """

  chunks: list[Chunk]
  collected: Collected
  seconds: float


class Run:
  """One run on the host.

  Args:
    workdir: its files and configuration.
    actor: chooses its actions; shared by all runs.
    data: recorded episodes to train on; None for an environment.

  Attributes:
    data: as above.
    env: its environments, or what stands for them.
    progress: how far it is.
    failure: why it cannot continue; empty if it can.
    saved: number of its newest checkpoint; None if there is none.
    collapsed: whether its latents have collapsed.
    runaway: whether its encoder moves faster than the game.
  """

  def __init__(self, workdir: Workdir, actor: Actor, data: Dataset | None = None):
    config = workdir.config
    self.workdir, self.config, self.spec, self._actor, self.data = workdir, config, workdir.spec, actor, data
    self.env: VectorEnv | Recorded
    self.collector: Collector | Recorded
    if data is None:
      self._make_env()
    else:
      self.env = self.collector = Recorded(data.training)
    self.latest = checkpoint.Checkpoints(workdir.checkpoints / "latest", keep=config.checkpoint.keep)
    self.best = checkpoint.Checkpoints(workdir.checkpoints / "best", keep=1)
    self.progress = Progress()
    self.failure = ""
    self.saved: int | None = None
    self.collapsed = False
    self.runaway = False
    self._metrics: telemetry.MetricsWriter | None = None

  def _make_env(self) -> None:
    """Makes the environments and their collector."""
    config, actor = self.config, self._actor
    env = self.env = envs.make(
      config.env.name,
      num_envs=config.env.num_envs,
      seed=seeds.env_seed(config.seed, Purpose.COLLECTION),
      life_loss_ends=config.env.life_loss_ends,
      max_episode_steps=config.env.max_episode_steps,
    )
    try:
      with actor.device_context():
        self.collector = Collector(
          env,
          actor.act,
          initial_state=actor.model.initial_state(env.num_envs),
          seed=seeds.derive(config.seed, Purpose.COLLECTION),
          epsilon=functools.partial(epsilon, config.collect),
          max_calls=config.collect.total_steps // env.num_envs,
        )
    except BaseException:
      env.close()
      raise

  @property
  def done(self) -> bool:
    """Whether no epoch is left, or none can be trained."""
    return bool(self.failure) or 0 < self.progress.total_epochs <= self.progress.epoch

  @property
  def metrics(self) -> telemetry.MetricsWriter:
    """The writer of the metrics, after `open_metrics`."""
    assert self._metrics is not None
    return self._metrics

  def open_metrics(self, log: Sequence[str]) -> None:
    """Opens the metrics and the named loggers, and drops the records after the epoch of the run."""
    last = self.progress.epoch
    own = loggers.make(log, self.workdir, last_epoch=last)
    self._metrics = telemetry.MetricsWriter(self.workdir.metrics, own, last_epoch=last)

  def close(self) -> None:
    """Finishes pending writes and frees the environments."""
    self.latest.close()
    self.best.close()
    if self._metrics is not None:
      self._metrics.close()
    self.env.close()

  def collect(self, params: Any, check: Callable[[], None]) -> Steps:
    """Takes the environment steps of the next epoch.

    Args:
      params: as `Actor.params` returns them.
      check: called after each step of all environments; its exception ends the collection.
    """
    start = time.monotonic()
    params = self._actor.to_device(params)
    if self.progress.epoch:
      chunks, collected = self._collect(params, self.config.collect.steps_per_epoch, check)
    else:
      chunks, collected = self._collect_first_epoch(params, check)
    return Steps(chunks, collected, time.monotonic() - start)

  def _collect_first_epoch(self, params: Any, check: Callable[[], None]) -> tuple[list[Chunk], Collected]:
    """Collects until the two rarer signs of rewards were seen often enough, within the configured bounds."""
    c = self.config.collect
    chunks, collected = self._collect(params, c.first_epoch_min_steps, check)
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

  def _collect(self, params: Any, steps: int, check: Callable[[], None]) -> tuple[list[Chunk], Collected]:
    """Takes up to `steps` steps, fewer when the run's total is reached."""
    steps = min(steps, self.config.collect.total_steps - self.collector.env_steps)
    if steps <= 0 or self.done:
      return [], Collected(0, [], [], (0, 0, 0))
    return self.collector.collect(params, [], lambda chunks, chunk: [*chunks, chunk], steps, check)

  def count_epochs(self) -> None:
    """Sets `total_epochs`, which depends on the first collection."""
    c = self.config
    left = c.collect.total_steps - self.collector.env_steps
    total = 1 + math.ceil(left / c.collect.steps_per_epoch) + c.training.final_epochs
    self.progress = self.progress._replace(total_epochs=total)

  def check_collapse(self, values: Mapping[str, Any]) -> bool:
    """Sets `collapsed` by the metrics of an epoch; returns whether it changed."""
    bounds, before = self.config.training, self.collapsed
    deviation, rank = (values.get(f"denoiser/latent_{name}") for name in ("deviation", "rank"))
    if self.config.encoder.kind == "learned" and deviation is not None and rank is not None:
      # NaN counts as collapsed.
      self.collapsed = not (deviation >= bounds.collapse_std and rank >= bounds.collapse_rank)
    return self.collapsed != before

  def check_movement(self, values: Mapping[str, Any]) -> bool:
    """Sets `runaway` by the metrics of an epoch; returns whether it has begun. The long first epoch does not count."""
    bound, before = self.config.training.runaway_movement, self.runaway
    movement = values.get("denoiser/encoder_movement", 0.0)
    self.runaway = self.progress.epoch > 1 and 0 < bound < movement
    return self.runaway and not before

  def collection_metrics(self, steps: Steps) -> dict[str, Any]:
    """Returns the epoch's metrics of environment steps."""
    collected, seconds = steps.collected, steps.seconds
    values: dict[str, Any] = {"env_steps": self.collector.env_steps, "frames": self.collector.frames}
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


def epsilon(config: CollectConfig, steps: int) -> float:
  """Returns the probability of a uniform action after environment steps."""
  if steps >= config.epsilon_steps:
    return config.epsilon
  return config.first_epsilon + (config.epsilon - config.first_epsilon) * steps / config.epsilon_steps


def _rarer_rewards(collected: Collected) -> int:
  return sum(sorted(collected.reward_counts)[:-1])
