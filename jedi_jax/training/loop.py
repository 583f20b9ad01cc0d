"""The loop: collect, train, log, evaluate, save; and again until the steps are spent."""

import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jedi_jax import checkpoint, envs, telemetry, workdir
from jedi_jax import replay as replay_lib
from jedi_jax.agent import Agent, make_act
from jedi_jax.config import Config, Updates
from jedi_jax.evaluation import EpisodeResult, human_normalized_score, random_policy, run_episodes
from jedi_jax.inspection import dreams
from jedi_jax.models.variants import Model, build, count_parameters
from jedi_jax.training import epoch as epoch_lib
from jedi_jax.training import seeds
from jedi_jax.training.collector import CHUNK_SLOTS, Collected, Collector
from jedi_jax.training.parallel import Devices
from jedi_jax.training.seeds import Purpose
from jedi_jax.training.state import make_init
from jedi_jax.training.updates import make_optimizers
from jedi_jax.types import EnvSpec, VectorEnv


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
  say: telemetry.Progress | None = None,
) -> dict[str, Any]:
  """Trains a run to its end, or continues it from its latest checkpoint.

  Args:
    config: the configuration.
    directory: the run's working directory.
    overwrite: starts anew in a directory that holds a run.
    devices: on which to train; all local devices if None.
    say: where progress is told; standard output if None.

  Returns:
    What result.json holds.

  Raises:
    UserError: for what the user can mend; nothing has been overwritten then.
  """
  devices = devices or Devices()
  say = say or telemetry.Progress()
  devices.check_batch(config.training.batch_size)
  spec = envs.spec(config.env.name)
  model = build(config, spec)  # Before anything is written: it refuses sizes that do not fit.
  run = workdir.prepare(directory, config, spec, overwrite=overwrite)
  if run.result.exists():
    say.say(f"{run.path} is complete; --overwrite starts it anew")
    return workdir.read_json(run.result)
  trainer = Trainer(run, model, devices, say)
  try:
    return trainer.run_to_end()
  finally:
    trainer.close()


class Trainer:
  """One run in this process.

  Args:
    run: its directory and configuration.
    model: what the configuration describes.
    devices: on which to train.
    say: where progress is told.
  """

  def __init__(self, run: workdir.Workdir, model: Model, devices: Devices, say: telemetry.Progress):
    self._run, self._devices, self._say = run, devices, say
    config, spec = run.config, run.spec
    self._config = config
    self._model = model
    self._optimizers = make_optimizers(config, model.phases)
    self._epoch: Any = epoch_lib.distribute(
      epoch_lib.make_epoch(
        self._model,
        self._optimizers,
        batch_size=config.training.batch_size,
        age_weights=config.replay.age_weights,
      ),
      devices,
    )
    self._add = devices.map(replay_lib.add, in_axes=(0, None), donate=(0,))
    self._strips = _make_strips(config, model)
    self._evaluator = Agent(self._model, {}, config)
    self._env = envs.make(
      config.env.name,
      num_envs=config.env.num_envs,
      seed=seeds.env_seed(config.seed, Purpose.COLLECTION),
      life_loss_ends=config.env.life_loss_ends,
      max_episode_steps=config.env.max_episode_steps,
    )
    self._collector = _make_collector(config, self._model, self._env)
    self._latest = checkpoint.Checkpoints(run.checkpoints / "latest", keep=config.checkpoint.keep)
    self._best = checkpoint.Checkpoints(run.checkpoints / "best", keep=1)
    self._progress = Progress(epoch=0, total_epochs=0, seconds=0.0, best=-math.inf)

    init = make_init(self._model, self._optimizers)
    key = jax.random.key(seeds.derive(config.seed, Purpose.TRAINING))
    number = self._latest.latest()
    if number is None:
      self._state = devices.replicate(jax.jit(init)(key))
      self._replay = devices.replicate(_empty_replay(config, spec))
    else:
      self._restore(number, jax.eval_shape(init, key))
      self._best.forget_after(number)
    self._metrics = telemetry.MetricsWriter(run.metrics, run.tensorboard, last_epoch=self._progress.epoch)

  def close(self) -> None:
    """Finishes what is being written and frees the environments."""
    self._latest.close()
    self._best.close()
    self._metrics.close()
    self._env.close()

  def run_to_end(self) -> dict[str, Any]:
    """Runs the epochs that are left, evaluates, and writes result.json."""
    self._describe()
    self._compile()
    config = self._config
    while self._progress.epoch == 0 or self._progress.epoch < self._progress.total_epochs:
      start = time.monotonic()
      values = self._run_epoch()
      epoch = self._progress.epoch
      if config.evaluation.interval_epochs and epoch % config.evaluation.interval_epochs == 0:
        values |= self._evaluate_and_keep_best()
      seconds = self._progress.seconds + time.monotonic() - start
      self._progress = self._progress._replace(seconds=seconds)
      values["time/total_seconds"] = seconds
      self._metrics.write(epoch, values)
      self._say.say(self._epoch_line(values))
      if epoch % config.checkpoint.interval_epochs == 0 or epoch == self._progress.total_epochs:
        self._save()
    return self._finish()

  def _describe(self) -> None:
    counts = count_parameters(self._state.params)
    counts = {name: count // self._devices.count for name, count in counts.items()}
    platform = self._devices.devices[0].platform
    self._say.say(
      f"{self._config.env.name}, variant {self._config.variant}, preset {self._config.preset}, "
      f"seed {self._config.seed}, {self._devices.count} {platform} device(s), in {self._run.path}"
    )
    shares = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    self._say.say(f"parameters: {shares}, in all {sum(counts.values()):,}; latent {self._model.latent_shape}")

  def _compile(self) -> None:
    self._say.say("compiling the epoch (the result is cached on disk) ...")
    start = time.monotonic()
    nothing = _traced(dict.fromkeys(self._counts(self._config.training.updates), 0))
    self._epoch = self._epoch.lower(self._state, self._replay, nothing).compile()
    self._say.say(f"compiled in {time.monotonic() - start:.1f} s")

  def _run_epoch(self) -> dict[str, Any]:
    """Collects and trains; returns the epoch's figures."""
    config, training = self._config, self._config.training
    start = time.monotonic()
    first = self._progress.epoch == 0
    collected = self._collect_first() if first else self._collect(config.collect.steps_per_epoch)
    collection_seconds = time.monotonic() - start
    if first:
      left = config.collect.total_steps - self._collector.env_steps
      total = 1 + math.ceil(left / config.collect.steps_per_epoch) + training.final_epochs
      self._progress = self._progress._replace(total_epochs=total)
    epoch = self._progress.epoch + 1
    counts = self._counts(training.first_updates if first else training.updates)
    figures = self._update(counts, split=epoch % training.time_phases_every == 0)
    seconds = time.monotonic() - start
    self._progress = self._progress._replace(epoch=epoch)
    steps = self._collector.env_steps
    values: dict[str, Any] = {
      "env_steps": steps,
      "frames": self._env.frames,
      **figures,
      "time/collect_seconds": collection_seconds,
      "time/epoch_seconds": seconds,
    }
    if collected.steps:
      values["collect/steps"] = collected.steps
      values["collect/steps_per_second"] = collected.steps / max(collection_seconds, 1e-9)
      values["collect/episodes"] = len(collected.returns)
      for sign, count in zip(("negative", "zero", "positive"), collected.reward_counts, strict=True):
        values[f"collect/rewards_{sign}"] = count
    if collected.returns:
      values["collect/return"] = float(np.mean(collected.returns))
      values["collect/length"] = float(np.mean(collected.lengths))
    return values

  def _collect(self, steps: int) -> Collected:
    """Takes up to `steps` real steps, fewer when the run's total is reached."""
    steps = min(steps, self._config.collect.total_steps - self._collector.env_steps)
    if steps <= 0:
      return Collected(0, [], [], (0, 0, 0))
    before, total = self._collector.env_steps, self._config.collect.total_steps

    def on_step(done: int) -> None:
      self._say.show("collecting, environment steps", before + done, total)

    self._replay, collected = self._collector.collect(self._acting_params(), self._replay, self._add, steps, on_step)
    return collected

  def _collect_first(self) -> Collected:
    """Collects until enough rewards of the two rarer signs were seen, within the configured bounds."""
    c = self._config.collect
    collected = self._collect(c.first_epoch_min_steps)
    while collected.steps < c.first_epoch_max_steps and _rarer_rewards(collected) < c.first_epoch_rewards:
      more = self._collect(min(c.steps_per_epoch, c.first_epoch_max_steps - collected.steps))
      collected = Collected(
        collected.steps + more.steps,
        collected.returns + more.returns,
        collected.lengths + more.lengths,
        tuple(a + b for a, b in zip(collected.reward_counts, more.reward_counts, strict=True)),  # type: ignore[arg-type]
      )
    return collected

  def _counts(self, updates: Updates) -> dict[str, int]:
    """Returns the number of updates of each phase that the model has, in order."""
    return {phase.name: getattr(updates, phase.name) for phase in self._model.phases}

  def _update(self, counts: Mapping[str, int], *, split: bool) -> dict[str, float]:
    """Runs one epoch's updates; returns mean metrics, seconds and rates."""
    total = sum(counts.values())
    sums: dict[str, Any] = {}
    seconds = dict.fromkeys(counts, 0.0)
    fused_seconds, done = 0.0, 0
    for call in plan_calls(counts, limit=self._config.training.updates_per_call, split=split):
      start = time.monotonic()
      self._state, result = self._epoch(self._state, self._replay, _traced(call))
      result = jax.device_get(self._devices.first(result))
      elapsed = time.monotonic() - start
      phases = [name for name, count in call.items() if count]
      if len(phases) == 1:
        seconds[phases[0]] += elapsed
      fused_seconds += elapsed
      sums = jax.tree.map(np.add, sums, result) if sums else result
      done += sum(call.values())
      self._say.show(f"epoch {self._progress.epoch + 1}, updates", done, total, f"({' and '.join(phases)})")
    values = telemetry.summarise(jax.tree.map(lambda x: x[0], sums), counts)
    values |= {f"updates/{name}": count for name, count in self._updates_done().items()}
    values["time/update_seconds"] = fused_seconds
    values["time/updates_per_second"] = total / max(fused_seconds, 1e-9)
    for name, spent in seconds.items():
      if spent > 0:
        values[f"time/{name}_seconds"] = spent
        values[f"time/{name}_updates_per_second"] = counts[name] / spent
    return values

  def _show_dreams(self) -> None:
    """Writes the strips of real and imagined frames."""
    if self._strips is not None:
      epoch = self._progress.epoch
      key = jax.random.fold_in(jax.random.key(seeds.derive(self._config.seed, Purpose.DREAMS)), epoch)
      share = self._devices.first((self._state.params, self._replay))
      self._metrics.write_image(epoch, "dreams/real_over_imagined", dreams.tile(self._strips(*share, key)))

  def _evaluate(self, params: dict[str, Any], *, episodes: int, purpose: Purpose) -> list[EpisodeResult]:
    c = self._config
    agent = self._evaluator
    agent.params = jax.device_put(params)
    num_envs = min(c.evaluation.num_envs, episodes)
    seed = seeds.env_seed(c.seed, purpose, self._progress.epoch)
    return evaluate(
      agent,
      c.env.name,
      episodes=episodes,
      num_envs=num_envs,
      seed=seed,
      max_episode_steps=c.evaluation.max_episode_steps,
      say=self._say,
    )

  def _evaluate_and_keep_best(self) -> dict[str, float]:
    start = time.monotonic()
    params = self._devices.to_host(self._state.params)
    results = self._evaluate(params, episodes=self._config.evaluation.interval_episodes, purpose=Purpose.EVALUATION)
    mean = float(np.mean([result.return_ for result in results]))
    if mean > self._progress.best:
      self._progress = self._progress._replace(best=mean)
      self._best.save(self._progress.epoch, params=params)
    self._show_dreams()
    return {
      "evaluation/return": mean,
      "evaluation/length": float(np.mean([result.length for result in results])),
      "time/evaluation_seconds": time.monotonic() - start,
    }

  def _finish(self) -> dict[str, Any]:
    """The final evaluation and result.json."""
    start = time.monotonic()
    params = self._devices.to_host(self._state.params)
    results = self._evaluate(params, episodes=self._config.evaluation.episodes, purpose=Purpose.FINAL)
    seconds = self._progress.seconds + time.monotonic() - start
    steps = self._collector.env_steps
    result = {
      "env": self._config.env.name,
      "variant": self._config.variant,
      "preset": self._config.preset,
      "seed": self._config.seed,
      "env_steps": steps,
      "frames": self._env.frames,
      "updates": self._updates_done(),
      **describe_results(self._config.env.name, results),
      "max_episode_steps": self._config.evaluation.max_episode_steps,
      "seconds": seconds,
    }
    self._latest.wait()  # A run with a result has its last checkpoint.
    self._best.wait()
    workdir.write_json(self._run.result, result)
    score = result["human_normalized_score"]
    self._say.say(
      f"done: mean return {result['mean_return']:.2f} over {len(results)} games"
      + (f", human-normalised score {score:.3f}" if score is not None else "")
      + f", {seconds:.0f} s; {self._run.result}"
    )
    return result

  def _epoch_line(self, values: Mapping[str, Any]) -> str:
    p = self._progress
    left = (p.total_epochs - p.epoch) * values["time/epoch_seconds"] if p.epoch > 1 else math.nan
    parts = [f"epoch {p.epoch}/{p.total_epochs}", f"{values['env_steps']:,} steps ({values['frames']:,} frames)"]
    for label, name in (
      ("return", "collect/return"),
      ("evaluated", "evaluation/return"),
      ("denoiser", "denoiser/loss"),
      ("reward/end", "reward_end/loss"),
      ("imagined return", "actor_critic/imagined_return"),
      ("entropy", "actor_critic/policy_entropy"),
    ):
      if name in values:
        parts.append(f"{label} {values[name]:.3g}")
    parts.append(f"{values['time/updates_per_second']:.1f} updates/s")
    if math.isfinite(left):
      parts.append(f"{left / 60:.0f} min left")
    return ", ".join(parts)

  def _updates_done(self) -> dict[str, int]:
    return {name: int(count) for name, count in self._devices.to_host(self._state.updates).items()}

  def _acting_params(self) -> dict[str, Any]:
    params = self._state.params
    return self._devices.first({name: params[name] for name in ("encoder", "actor_critic")})

  def _save(self) -> None:
    state = self._devices.to_host(self._state)
    self._latest.save(
      self._progress.epoch,
      params=state.params,
      state={
        "train": state.replace(params={}),
        "replay": self._devices.to_host(self._replay),
        "collector": self._collector.save(),
        "progress": {name: np.asarray(value, np.float64) for name, value in self._progress._asdict().items()},
      },
    )

  def _restore(self, number: int, shapes: Any) -> None:
    """Continues from a checkpoint."""
    empty = jax.eval_shape(lambda: _empty_replay(self._config, self._run.spec))
    target = {
      "train": shapes.replace(params={}),
      "replay": empty,
      "collector": self._collector.save(),
      "progress": {name: np.zeros((), np.float64) for name in Progress._fields},
    }
    params, saved = self._latest.restore(number, params=shapes.params, state=target)
    self._state = self._devices.replicate(saved["train"].replace(params=params))
    self._replay = self._devices.replicate(saved["replay"])
    p = saved["progress"]
    self._progress = Progress(int(p["epoch"]), int(p["total_epochs"]), float(p["seconds"]), float(p["best"]))
    steps = int(saved["collector"]["calls"]) * self._env.num_envs

    def on_step(done: int) -> None:
      self._say.show("repeating environment steps", done, steps)

    self._say.say(f"resuming after epoch {self._progress.epoch}: repeating {steps:,} environment steps")
    self._collector.restore(saved["collector"], on_step)


def evaluate(
  agent: Agent | None,
  env_name: str,
  *,
  episodes: int,
  num_envs: int,
  seed: int,
  max_episode_steps: int,
  say: telemetry.Progress | None = None,
) -> list[EpisodeResult]:
  """Plays whole games under the paper's protocol: no life-loss ends, epsilon 0, sampled actions.

  Args:
    agent: the policy; None draws every action uniformly.
    env_name: the environment.
    episodes: number of games.
    num_envs: environments, each playing a fixed number of them.
    seed: of the environments and of the actions.
    max_episode_steps: time limit in agent steps.
    say: where progress is told, nowhere if None.
  """
  env = envs.make(env_name, num_envs=num_envs, seed=seed, life_loss_ends=False, max_episode_steps=max_episode_steps)
  finished: list[EpisodeResult] = []

  def on_episode(result: EpisodeResult) -> None:
    finished.append(result)
    if say is not None:
      say.show("evaluating, games", len(finished), episodes, f"return {np.mean([r.return_ for r in finished]):.2f}")

  policy = random_policy(env.spec.num_actions, seed) if agent is None else agent.player(num_envs, seed)
  try:
    return run_episodes(env, policy, episodes=episodes, on_episode=on_episode)
  finally:
    env.close()


def describe_results(env_name: str, results: list[EpisodeResult]) -> dict[str, Any]:
  """Returns the figures that result.json and evaluation.json share."""
  returns = [result.return_ for result in results]
  mean = float(np.mean(returns))
  return {
    "episode_returns": returns,
    "episode_lengths": [result.length for result in results],
    "episodes_truncated": sum(result.truncated for result in results),
    "mean_return": mean,
    "human_normalized_score": human_normalized_score(env_name, mean),
  }


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


def _traced(counts: Mapping[str, int]) -> dict[str, np.ndarray]:
  return {name: np.asarray(count, np.int32) for name, count in counts.items()}


def _rarer_rewards(collected: Collected) -> int:
  return sum(sorted(collected.reward_counts)[:-1])


def _empty_replay(config: Config, spec: EnvSpec) -> replay_lib.ReplayState:
  slots = -(-(config.replay.capacity + config.replay.final_frames) // config.env.num_envs)
  return replay_lib.init(
    num_streams=config.env.num_envs,
    slots_per_stream=max(slots, CHUNK_SLOTS),
    observation_shape=spec.observation_shape,
  )


def _make_strips(config: Config, model: Model) -> Any:
  """Returns the compiled function (shares of parameters and replay, key) -> strips; None where none are wanted."""
  if model.decode is None or not config.probe.strips:
    return None
  strips = dreams.make_strips(model, count=config.probe.strips, steps=config.actor_critic.horizon)

  def strips_of_share(params: Any, replay: Any, key: Any) -> Any:
    params, replay = jax.tree.map(lambda x: x[0], (params, replay))
    return strips(params, replay, key)

  return jax.jit(strips_of_share)


def _make_collector(config: Config, model: Model, env: VectorEnv) -> Collector:
  act = make_act(model)

  @jax.jit
  def act_on_share(share: Any, *rest: Any) -> Any:
    # A device's share has a leading axis of length 1; taking it off here costs no copy outside.
    return act(jax.tree.map(lambda x: x[0], share), *rest)

  return Collector(
    env,
    act_on_share,
    initial_state=model.initial_state(env.num_envs),
    seed=seeds.derive(config.seed, Purpose.COLLECTION),
    epsilon=config.collect.epsilon,
    max_calls=config.collect.total_steps // env.num_envs,
  )
