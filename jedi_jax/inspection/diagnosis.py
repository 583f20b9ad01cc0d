"""Diagnosis of a trained model: measures each of its parts on real games that it was not trained on."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.agent import Agent, load_agent
from jedi_jax.errors import UserError
from jedi_jax.inspection.recording import Episode, real_episodes, windows
from jedi_jax.models import phases
from jedi_jax.models.dynamics import DenoisingNoise
from jedi_jax.ops import edm
from jedi_jax.ops.statistics import latent_statistics
from jedi_jax.runs import telemetry, workdir
from jedi_jax.training import dreams, parallel
from jedi_jax.training.seeds import evaluation_seed
from jedi_jax.types import Array, Metrics, Params, Segment

_CHUNK = 64
"""Frames encoded in one call."""

Figures = dict[str, Any]


def diagnose_run(
  directory: str | os.PathLike[str],
  *,
  checkpoint: str = "latest",
  steps: int = 2_000,
  num_envs: int = 4,
  segments: int = 128,
  seed: int = 0,
  data: str | os.PathLike[str] | None = None,
) -> Figures:
  """Plays a run's environment with its policy, diagnoses the run, and writes diagnosis.json to its directory.

  A run on recorded episodes is diagnosed on those of its data set that are held out. Its critic is not judged, since
  the returns are not those of its policy.

  Args:
    directory: the run's working directory.
    checkpoint: 'latest' or 'best'; see `load_agent`.
    steps: environment steps over all environments; rounded up to a multiple of `num_envs`.
    num_envs: number of environments.
    segments: see `diagnose`.
    seed: seed of games, actions and noise. The games are not those of training.
    data: directory of the run's data set, if that has moved.

  Returns:
    The contents of the file: the figures of `diagnose`, and 'env', 'variant', 'checkpoint', 'seed' and 'steps'.

  Raises:
    UserError: if there is no such run or checkpoint, or its data set is missing or has changed.
  """
  run = workdir.read(directory)
  agent = load_agent(run.path, checkpoint)
  episodes = real_episodes(run, agent, steps=steps, num_envs=num_envs, seed=evaluation_seed(seed), data=data)
  figures = {
    "env": run.config.env.name,
    "variant": run.config.variant,
    "checkpoint": checkpoint,
    "seed": seed,
    "steps": sum(len(episode.actions) for episode in episodes),
    **diagnose(agent, episodes, seed=seed, segments=segments, value=run.data is None),
  }
  workdir.write_json(run.diagnosis, figures)
  return figures


def diagnose(
  agent: Agent, episodes: list[Episode], *, seed: int = 0, segments: int = 128, value: bool = True
) -> Figures:
  """Measures each part of a model on real episodes.

  Args:
    agent: an agent with all parameters and its configuration.
    episodes: real games of its policy, as `recording.record` plays them, not those of its training.
    seed: seed of the choice of segments and of the noise.
    segments: maximum number of segments of L + H frames, with L conditioning frames and horizon H.
    value: whether the critic is judged; then the episodes must be of its policy.

  Returns:
    A dictionary of JSON values:
      'segments': number of segments.
      'latents': 'latent_std', 'latent_rank', 'latent_deviation', 'latent_change' (see `telemetry.summarise`) and
        'largest', the largest absolute value.
      'denoising': lists 'sigma', 'loss' (as in training, conditioned on real latents) and 'without_network', the loss
        of an inner network with output 0. Absent if the dynamics has no noise levels.
      'open_loop': lists 'error' and 'copying' over steps 1 to H: root mean square error of the latents imagined with
        the real actions, and of the last real latent as a constant prediction, in standard deviations of real latents.
      'sampler': 'calibration' (see `dreams.calibration`), and 'error', the open-loop error of the first step over that
        of copying.
      'rewards_ends': 'on_real' latents and 'in_imagination' (with the real actions): counts, precision and recall of
        each class, and 'f1', the mean F1 score of negative rewards, positive rewards and ends, over the classes with at
        least 5 examples; None if there is no such class.
      'value': 'correlation' of the critic's value with the discounted return (None if one of them is constant), 'bias'
        (mean of value minus return), and lists 'predicted' and 'realised': mean value and return of each fifth of the
        steps, ordered by value. Absent if `value` is false.
      'weakest': a sentence that names the weakest part; see `weakest`.

  Raises:
    UserError: if the agent has no configuration, or there are no episodes.
  """
  if agent.config is None:
    raise UserError("the agent has no configuration: load it from a run's directory")
  if not episodes:
    raise UserError("there is no episode to diagnose: record more steps")
  model, config = agent.model, agent.config
  length, horizon = model.conditioning_frames, config.actor_critic.horizon
  windowed = windows(episodes, before=length, after=horizon, stride=horizon)
  count = len(windowed.mask)
  rng = np.random.default_rng(seed)
  chosen = np.sort(rng.permutation(count)[:segments])
  segment = jax.tree.map(lambda x: x[chosen], windowed)
  key = jax.random.key(seed)

  figures: Figures = {"segments": len(chosen)}
  figures["latents"] = _latents(agent, segment)
  denoising = _denoising(agent, segment, jax.random.fold_in(key, 0))
  if denoising:
    figures["denoising"] = denoising
  figures |= _imagination(agent, segment, jax.random.fold_in(key, 1), jax.random.fold_in(key, 2))
  if value:
    figures["value"] = _value(agent, episodes)
  figures["weakest"] = weakest(figures, encoder=config.encoder.kind == "learned")
  return figures


def _latents(agent: Agent, segment: Segment) -> Figures:
  @jax.jit
  def measure(params: dict[str, Params], segment: Segment) -> tuple[dict[str, Array], Array]:
    latents = agent.model.encode(params, segment.observations, segment.mask)
    statistics = parallel.reduce_metrics(latent_statistics(latents, segment.mask, None))
    return statistics, jnp.max(jnp.abs(latents))

  statistics, largest = jax.device_get(measure(agent.params, segment))
  figures = telemetry.summarise({"latents": statistics}, {"latents": 1})
  return {**{name.removeprefix("latents/"): x for name, x in figures.items()}, "largest": float(largest)}


def _denoising(agent: Agent, segment: Segment, key: Array) -> Figures:
  """Measures the denoising loss by noise level; empty for dynamics without noise levels."""
  assert agent.config is not None
  model, c = agent.model, agent.config.denoiser
  length, count = model.conditioning_frames, len(segment.mask)
  stop = length + c.targets
  if segment.mask.shape[1] < stop:
    return {}
  segment = jax.tree.map(lambda x: x[:, :stop], segment)
  noise = model.dynamics.training_noise(jax.random.split(key, count), key, jnp.zeros((), jnp.int32))
  if not isinstance(noise, DenoisingNoise):
    return {}

  # Segment and noise are arguments; XLA would spend minutes on folding them as constants.
  @jax.jit
  def measure(params: dict[str, Params], segment: Segment, noise: DenoisingNoise, level: Array) -> tuple[Array, Array]:
    at_level = noise._replace(sigma=jnp.full_like(noise.sigma, level), use_estimate=jnp.zeros((), bool))
    params = phases.imagining(params)
    latents = model.encode(params, segment.observations, segment.mask)
    clean, weights = latents[:, length:], segment.mask[:, length:].astype(jnp.float32)
    losses = model.dynamics.losses(
      params["denoiser"], latents[:, :-1], clean, segment.actions[:, :-1], segment.mask[:, length:], at_level
    )
    terms = losses.terms.values()
    loss = sum(jnp.sum(term.values * term.weights) for term in terms) / (jnp.sum(weights) / c.targets)
    flat, before = (x.reshape(-1, *model.latent_shape) for x in (clean, latents[:, length - 1 : -1]))
    flat = model.dynamics.normalise(params["denoiser"], flat, before)
    sigma = jnp.full((len(flat),), level)
    coefficients = edm.precondition(sigma, sigma_data=c.sigma_data, offset_noise=c.offset_noise)
    noisy = edm.corrupt(
      flat,
      sigma,
      noise.noise.reshape(flat.shape),
      noise.offset.reshape(len(flat), 1, 1, -1),
      offset_noise=c.offset_noise,
    )
    _, c_out, c_skip = (x[:, None, None, None] for x in coefficients[:3])
    without_network = jnp.mean(jnp.square((flat - c_skip * noisy) / c_out), axis=(1, 2, 3))
    return loss, jnp.average(without_network, weights=weights.reshape(-1))

  levels = np.geomspace(c.sigma_min, c.sigma_max, 12)
  pairs = [jax.device_get(measure(agent.params, segment, noise, level)) for level in levels.astype(np.float32)]
  return {
    "sigma": levels.tolist(),
    "loss": [float(loss) for loss, _ in pairs],
    "without_network": [float(loss) for _, loss in pairs],
  }


def _imagination(agent: Agent, segment: Segment, dream_key: Array, sample_key: Array) -> Figures:
  """Measures open-loop errors, the sampler, and the reward / end model on real and on imagined latents."""

  @jax.jit
  def measure(params: dict[str, Params], segment: Segment, dream_key: Array, sample_key: Array) -> Metrics:
    calibration = dreams.calibration(agent.model, params, segment, sample_key)
    return {**dreams.compare(agent.model, params, segment, dream_key)[1], "calibration": calibration}

  figures = jax.device_get(measure(agent.params, segment, dream_key, sample_key))
  got = {name: np.asarray(x, np.float64) for name, x in figures.items()}
  sampler = {
    "calibration": float(got["calibration"]),
    "error": float(got["error"][0] / max(got["copying"][0], 1e-8)),
  }
  return {
    "open_loop": {name: [float(x) for x in got[name]] for name in ("error", "copying")},
    **({} if agent.model.dynamics.denoise is None else {"sampler": sampler}),
    "rewards_ends": {
      name: {
        **telemetry.precision_and_recall("reward", got[f"reward_{source}"]),
        **telemetry.precision_and_recall("end", got[f"end_{source}"]),
        "f1": telemetry.f1(got[f"reward_{source}"], got[f"end_{source}"]),
      }
      for name, source in (("on_real", "real"), ("in_imagination", "imagined"))
    },
  }


def _value(agent: Agent, episodes: list[Episode]) -> Figures:
  """Compares the critic's value of real frames with the discounted return, bootstrapped at an unfinished end."""
  assert agent.config is not None
  model, gamma = agent.model, agent.config.actor_critic.gamma

  @jax.jit
  def measure(params: dict[str, Params], observations: Array, state: Any) -> tuple[Array, Any]:
    latents = model.encode(params, observations[None], jnp.ones((1, len(observations)), bool))
    _, values, state = model.actor_critic.apply(params["actor_critic"], latents, state)
    return values[0], state

  predicted, realised = [], []
  for episode in episodes:
    state, values = model.initial_state(1), []
    count = len(episode.observations)
    padded = np.concatenate([episode.observations, np.repeat(episode.observations[-1:], -count % _CHUNK, axis=0)])
    for chunk in np.split(padded, len(padded) // _CHUNK):
      some, state = measure(agent.params, chunk, state)
      values.append(np.asarray(some, np.float64))
    all_values = np.concatenate(values)[:count]
    following = 0.0 if np.asarray(episode.ends)[-1] else all_values[-1]
    returns = np.zeros(count - 1)
    for t in reversed(range(count - 1)):
      following = returns[t] = np.sign(episode.rewards[t]) + gamma * following
    predicted.append(all_values[:-1])
    realised.append(returns)
  values_, returns_ = np.concatenate(predicted), np.concatenate(realised)
  order = np.array_split(np.argsort(values_, kind="stable"), 5)
  vary = min(values_.std(), returns_.std()) > 1e-8
  return {
    "correlation": float(np.corrcoef(values_, returns_)[0, 1]) if vary else None,
    "bias": float(np.mean(values_ - returns_)),
    "predicted": [float(values_[part].mean()) for part in order if len(part)],
    "realised": [float(returns_[part].mean()) for part in order if len(part)],
  }


def weakest(figures: Mapping[str, Any], *, encoder: bool = True) -> str:
  """Returns a sentence that names the weakest part.

  It is the part with the highest fault, from 0 (none) to 1 (no better than no model):
    reward / end model: 1 - F1 on real latents.
    dynamics: the larger of the decrease of F1 from real to imagined latents, and the open-loop error after H steps
      over that of copying the last latent.
    sampler: the open-loop error of the first step over that of copying, times 1 - c, where c is the calibration or, if
      that is above 1, its inverse.
    critic: 1 - correlation of values with returns.
  If the latents have collapsed, it is the encoder.

  Args:
    figures: figures of `diagnose`.
    encoder: whether the model learns one; frames that are their own latents cannot collapse.
  """
  deviation, rank = (figures["latents"].get(f"latent_{name}", 0.0) for name in ("deviation", "rank"))
  if encoder and (not deviation > 1e-2 or not rank > 1.5):
    return (
      f"the encoder: its latents have collapsed (deviation over time {deviation:.3g}, effective rank {rank:.2g}); "
      "first check the gradients that reach it"
    )
  faults: list[tuple[float, str]] = []
  real, imagined = (figures["rewards_ends"][name]["f1"] for name in ("on_real", "in_imagination"))
  if real is not None:
    faults.append((1 - real, f"the reward / end model: F1 {real:.2f} even on real latents"))
    if imagined is not None:
      faults.append(
        (
          real - imagined,
          f"the dynamics: F1 of rewards and ends falls from {real:.2f} to {imagined:.2f} in imagination",
        )
      )
  error, copying = figures["open_loop"]["error"][-1], figures["open_loop"]["copying"][-1]
  steps = len(figures["open_loop"]["error"])
  faults.append(
    (
      error / max(copying, 1e-8),
      f"the dynamics: after {steps} steps its error is {error:.2f} standard deviations, that of copying {copying:.2f}",
    )
  )
  if "sampler" in figures:
    calibration, error = figures["sampler"]["calibration"], figures["sampler"]["error"]
    faults.append(
      (
        error * (1 - min(calibration, 1 / max(calibration, 1e-8))),
        f"the sampler: the variance of its samples is {calibration:.2f} of their squared error, and the error of one "
        f"step {error:.2f} of that of copying",
      )
    )
  correlation = figures["value"]["correlation"] if "value" in figures else None
  if correlation is not None:
    faults.append((1 - correlation, f"the critic: its values correlate {correlation:.2f} with the returns"))
  fault, sentence = max(faults)
  unjudged = f"; rewards and ends are not judged: fewer than {telemetry.MIN_EXAMPLES} of each kind"
  return f"{sentence} (fault {min(max(fault, 0.0), 1.0):.2f} of 1){unjudged if real is None else ''}"
