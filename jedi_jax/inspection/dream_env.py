"""The dream as an environment of Gymnasium: a step is imagination in the trained world model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax import replay as replay_lib
from jedi_jax.agent import Agent, load_agent
from jedi_jax.datasets import load_replay
from jedi_jax.errors import UserError, nearest
from jedi_jax.models import imagination, phases
from jedi_jax.models.base import Build, Model
from jedi_jax.models.build import build as build_model
from jedi_jax.models.imagination import WorldState
from jedi_jax.replay import ReplayState
from jedi_jax.runs import sharing, workdir
from jedi_jax.types import Array, Params, Segment

if TYPE_CHECKING:
  from jedi_jax.inspection.gymnasium_envs import DreamEnv, DreamVectorEnv

OBSERVATIONS = ("images", "latents")
REWARDS = ("sampled", "most_likely")


def dream_env(
  agent: Agent | str | os.PathLike[str],
  *,
  num_envs: int | None = None,
  observations: str = "images",
  rewards: str = "sampled",
  max_episode_steps: int | None = 100,
  starts: Any = None,
  which: str = "latest",
  build: Build = build_model,
) -> DreamEnv | DreamVectorEnv:
  """Returns the dream of an agent as an environment of Gymnasium (1.1 or newer).

  A reset draws real frames and encodes them; every later latent is imagined. Actions are integers in [0, A). The reward
  is the sign of the game's, a number of -1, 0 and 1. `terminated` is drawn from the end that the world model predicts.
  All random numbers come from the seed of `reset`; environment i of several has the seed `seed + i`, and dreams what a
  single one with that seed does, up to rounding. The averaged denoiser imagines if the agent has one.

  Args:
    agent: an agent with all parameters, or the directory of a run.
    num_envs: N of a `gymnasium.vector.VectorEnv`, compiled as one batch; None for a `gymnasium.Env`. The autoreset mode
      is SAME_STEP: the observation of a finished episode is in `info["final_obs"]`.
    observations: 'images', decoded [H, W, C] uint8, the first one too; 'latents', [h, w, c] float32.
    rewards: 'sampled' from the predicted distribution, or its 'most_likely' sign.
    max_episode_steps: steps after which an episode is truncated; None for no limit.
    starts: where episodes start, at a frame on which an action was taken: the directory of a run, drawn as imagination
      does in training; episodes as `replay.from_episodes` takes them, or its result, of which an episode and then a
      step is drawn uniformly; or a `Segment` [R, L, ...], such as `recording.windows(episodes, before=L, after=0)`, of
      which a row is drawn. None for the directory given as `agent`.
    which: as in `load_agent`, if `agent` is a directory.
    build: builds the model, as in `train`, if `agent` is a directory.

  Raises:
    UserError: if Gymnasium is not installed; if there is no such run or checkpoint; if the agent has no decoder for
      images; if an argument is out of its range; or if the starts do not fit the model.
  """
  for name, value, known in (("observations", observations, OBSERVATIONS), ("rewards", rewards, REWARDS)):
    if value not in known:
      raise UserError(f"{name}={value!r}{nearest(str(value), known)}")
  for name, number in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
    if number is not None and (isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1):
      raise UserError(f"{name}={number!r}: give an integer of at least 1, or None")
  try:
    from jedi_jax.inspection import gymnasium_envs
  except ImportError:
    raise UserError("the dream as an environment needs Gymnasium: pip install 'gymnasium>=1.1'") from None
  if not isinstance(agent, Agent):
    if not isinstance(agent, str | os.PathLike):
      raise UserError(f"agent is a {type(agent).__name__}: give an Agent or the directory of a run")
    starts = agent if starts is None else starts
    agent = load_agent(agent, which, build=build)
  if starts is None:
    raise UserError("an agent has no frames to start from: give starts, such as the directory of its run")
  if observations == "images" and agent.model.decode is None:
    raise UserError(
      "the agent has no decoder or probe for images: take observations='latents', or fit a probe with "
      "jedi_jax.inspection.probe.fit"
    )
  dream = Dream(agent, starts, num_envs=num_envs or 1, images=observations == "images", rewards=rewards)
  if num_envs is None:
    return gymnasium_envs.DreamEnv(dream, max_episode_steps)
  return gymnasium_envs.DreamVectorEnv(dream, max_episode_steps)


class Dream:
  """N dreams that are imagined as one batch, by compiled functions of static shapes.

  Args:
    agent: an agent with all parameters.
    starts: see `dream_env`.
    num_envs: N.
    images: whether observations are images; otherwise they are latents.
    rewards: see `dream_env`.

  Attributes:
    model: the model.
    num_envs: N.
    num_actions: of the game, an int.
    images: as above.

  Raises:
    UserError: if the starts do not fit the model.
  """

  def __init__(self, agent: Agent, starts: Any, *, num_envs: int, images: bool, rewards: str):
    self.model, self.num_envs, self.images = agent.model, num_envs, images
    self.num_actions = int(self.model.num_actions(agent.params))
    given, draw = _read_starts(agent, starts)
    self._starts = jax.device_put(given)
    self._params = jax.jit(functools.partial(phases.prepared, self.model.parts))(agent.params)
    self._restart = jax.jit(functools.partial(_restart, self.model, draw, images))
    self._step = jax.jit(functools.partial(_step, self.model, images, rewards))
    self._decode = jax.jit(functools.partial(_observe, self.model, True))  # noqa: FBT003 - as images.
    none = np.zeros(num_envs, np.uint32)
    state, _ = jax.eval_shape(self._restart, self._params, self._starts, None, none, none, None)
    self._state: WorldState = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)

  def restart(self, seeds: np.ndarray, counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Starts new episodes.

    Args:
      seeds: [N] uint32, one an environment.
      counts: [N] uint32; with the seed they give the random numbers of this call.
      chosen: [N] bool; the other episodes go on.

    Returns:
      [N, ...] observations; arbitrary where `chosen` is false.
    """
    self._state, observations = self._restart(self._params, self._starts, self._state, seeds, counts, chosen)
    return np.array(observations)  # A copy that can be written to.

  def step(self, seeds: np.ndarray, counts: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Imagines one step of all episodes.

    Args:
      seeds: as in `restart`.
      counts: as in `restart`.
      actions: [N] integers in [0, A).

    Returns:
      Observations [N, ...], rewards [N] float32 and ends [N] bool.
    """
    self._state, *outputs = self._step(self._params, self._state, np.asarray(actions, np.int32), seeds, counts)
    return tuple(np.array(x) for x in jax.device_get(outputs))

  def decode(self) -> np.ndarray:
    """Returns images [N, H, W, C] uint8 of the current latents; the model must have `decode`."""
    return np.asarray(self._decode(self._params, self._state))


def _keys(seeds: Array, counts: Array) -> Array:
  """Returns a key for each seed and count."""
  return jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(seeds, counts)


def _observe(model: Model, images: bool, params: dict[str, Params], state: WorldState) -> Array:  # noqa: FBT001
  latents = state.past[:, -1:]
  if not images:
    return latents[:, 0].astype(jnp.float32)
  assert model.decode is not None
  return model.decode(params, latents)[:, 0]


def _restart(
  model: Model,
  draw: Callable[[Any, Array], Segment],
  images: bool,  # noqa: FBT001
  params: dict[str, Params],
  starts: Any,
  state: WorldState | None,
  seeds: Array,
  counts: Array,
  chosen: Array | None,
) -> tuple[WorldState, Array]:
  """Draws and encodes starts; `state` goes on where `chosen` is false."""
  segment = draw(starts, _keys(seeds, counts))
  latents = model.encode(params, segment.observations, segment.mask)
  fresh = imagination.start_world(model.reward_end, params["reward_end"], latents, segment.actions[:, :-1])
  if state is not None and chosen is not None:
    fresh = jax.tree.map(lambda new, old: jnp.where(chosen.reshape(-1, *(1,) * (new.ndim - 1)), new, old), fresh, state)
  return fresh, _observe(model, images, params, fresh)


def _step(
  model: Model,
  images: bool,  # noqa: FBT001
  rewards: str,
  params: dict[str, Params],
  state: WorldState,
  actions: Array,
  seeds: Array,
  counts: Array,
) -> tuple[WorldState, Array, Array, Array]:
  """Imagines one step; returns state, observations, rewards and ends."""
  keys = _keys(seeds, counts)
  noise = imagination.draw_noise(model.dynamics, keys, horizon=1, num_actions=model.spec.num_actions)
  noise = jax.tree.map(lambda x: x[0], noise)
  if rewards == "most_likely":
    noise = noise._replace(rewards=jnp.zeros_like(noise.rewards))
  state, outcome = imagination.step_world(model.dynamics, model.reward_end, params, state, actions, noise)
  return state, _observe(model, images, params, state), outcome.reward, outcome.end


def _read_starts(agent: Agent, starts: Any) -> tuple[Any, Callable[[Any, Array], Segment]]:
  """Returns arrays, and a function from them and keys [B] to segments [B, L, ...] whose last frame is real."""
  model, length = agent.model, agent.model.conditioning_frames
  if isinstance(starts, Segment):
    return _check_rows(model, starts), _draw_row
  how: dict[str, Any] = {"age_weights": (1.0,)}
  if isinstance(starts, str | os.PathLike):
    run = workdir.read(sharing.resolve(starts))
    how = {"age_weights": run.config.replay.age_weights, "age_groups": run.config.replay.age_groups}
    try:
      starts = load_replay(run)
    except UserError as error:
      raise UserError(f"{error}: give starts") from None
  elif not isinstance(starts, ReplayState):
    if not isinstance(starts, Iterable):
      raise UserError(f"starts is a {type(starts).__name__}: give the directory of a run, episodes or a Segment")
    starts = replay_lib.from_episodes(starts)
  _check_frames(model, starts.observation_shape, starts.actions)
  if not np.any(np.asarray(starts.episode_steps)[: int(starts.num_episodes)]):
    raise UserError("the replay has no steps to start from")
  # As imagination draws in training: the last frame is one on which an action was taken.
  return starts, functools.partial(replay_lib.sample, length=length, beyond_end=False, final_frames=False, **how)


def _draw_row(rows: Segment, keys: Array) -> Segment:
  index = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(rows.mask)))(keys)
  return jax.tree.map(lambda x: x[index], rows)


def _check_rows(model: Model, rows: Segment) -> Segment:
  length = model.conditioning_frames
  mask = np.asarray(rows.mask)
  if mask.ndim != 2 or mask.shape[1] != length or not mask.size:
    raise UserError(f"starts have a mask of shape {mask.shape}: give at least one row of {length} frames")
  if not mask[:, -1].all():
    raise UserError("the last frame of a start is padding: it must be real")
  frames, actions = np.shape(rows.observations), np.asarray(rows.actions)
  kinds = rows.observations.dtype == np.uint8 and actions.dtype.kind in "iu"
  if frames[:2] != mask.shape or actions.shape != mask.shape or not kinds:
    raise UserError(
      f"starts have observations of {rows.observations.dtype} {frames} and actions of {actions.dtype} {actions.shape}: "
      f"give uint8 and integers of {mask.shape[0]} rows of {length} frames"
    )
  _check_frames(model, frames[2:], actions)
  return rows


def _check_frames(model: Model, shape: tuple[int, ...], actions: Any) -> None:
  if tuple(shape) != tuple(model.spec.observation_shape):
    raise UserError(f"the starts have frames of shape {tuple(shape)}, the model of {model.spec.observation_shape}")
  for action in (int(np.min(actions)), int(np.max(actions))):
    if not 0 <= action < model.spec.num_actions:
      raise UserError(f"action {action} in the starts must lie in 0..{model.spec.num_actions - 1}")
