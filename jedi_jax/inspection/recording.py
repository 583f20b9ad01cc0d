"""Records real games of an agent and cuts them into segments."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax import datasets, envs
from jedi_jax import replay as replay_lib
from jedi_jax.agent import Agent, make_act
from jedi_jax.episodes import Episode
from jedi_jax.errors import UserError
from jedi_jax.runs.workdir import Workdir
from jedi_jax.training.collector import CHUNK_SLOTS, Collector
from jedi_jax.types import Segment


def record(agent: Agent, *, steps: int, num_envs: int, seed: int, epsilon: float = 0.0) -> list[Episode]:
  """Plays the agent's environment with the settings of its training, such as life losses that end an episode.

  Args:
    agent: an agent with its configuration.
    steps: steps of each environment, at least 1.
    num_envs: number of environments.
    seed: seed of games and actions.
    epsilon: probability of a uniform action.

  Returns:
    The episodes, ordered by their start. The last step of an unfinished episode is dropped, since the frame after it
    is not recorded.

  Raises:
    UserError: if the agent has no configuration.
  """
  if agent.config is None:
    raise UserError("the agent has no configuration: load it from a run's directory")
  e = agent.config.env
  env = envs.make(
    e.name,
    num_envs=num_envs,
    seed=seed,
    life_loss_ends=e.life_loss_ends,
    max_episode_steps=e.max_episode_steps,
  )
  try:
    # Each step can be an episode with a final frame of its own.
    replay = replay_lib.init(
      num_streams=num_envs,
      slots_per_stream=max(2 * steps, CHUNK_SLOTS),
      observation_shape=env.spec.observation_shape,
    )
    collector = Collector(
      env,
      jax.jit(make_act(agent.model)),
      initial_state=agent.initial_state(num_envs),
      seed=seed,
      epsilon=lambda steps: epsilon,
      max_calls=steps,
    )
    add = jax.jit(replay_lib.add, donate_argnums=0)
    replay, _ = collector.collect(agent.params, replay, add, steps * num_envs)
  finally:
    env.close()
  return [with_ends(episode) for episode in replay_lib.to_episodes(jax.device_get(replay))]


def real_episodes(
  run: Workdir,
  agent: Agent,
  *,
  steps: int,
  num_envs: int,
  seed: int,
  data: str | os.PathLike[str] | None = None,
) -> list[Episode]:
  """Returns episodes that a run was not trained on: new games, or the held-out ones of its data.

  Args:
    run: the run.
    agent: its agent, which plays new games.
    steps: steps over all environments, rounded up to a multiple of `num_envs`; of data at least as many, if there are.
    num_envs: number of environments.
    seed: seed of games and actions.
    data: directory of the run's data set, if that has moved.

  Raises:
    UserError: if the run's data set is missing or has changed, or `data` is given for a run with an environment.
  """
  if run.data is None and data is None:
    return record(agent, steps=-(-steps // num_envs), num_envs=num_envs, seed=seed)
  episodes: list[Episode] = []
  left = steps
  for episode in datasets.held_out(run, data):
    if left <= 0:
      break
    episodes.append(with_ends(episode))
    left -= len(episode.actions)
  return episodes


def with_ends(episode: Episode) -> Episode:
  """Returns an episode with `ends` of every step, as `windows` takes it."""
  observations, actions, rewards, terminated = episode
  ends = np.zeros(len(actions), bool)
  ends[-1] = terminated
  return Episode(observations, np.asarray(actions, np.int32), np.asarray(rewards, np.float32), ends)


def windows(episodes: list[Episode], *, before: int, after: int, stride: int) -> Segment:
  """Cuts episodes into segments of `before + after` frames.

  Args:
    episodes: the episodes.
    before: L, number of frames up to and including the start of a segment.
    after: number of frames after the start.
    stride: number of steps between starts; the first start is the first frame of the episode.

  Returns:
    `Segment` with one row per start, ordered by episode; frames outside the episode are masked.

  Raises:
    UserError: if there is no episode.
  """
  if not episodes:
    raise UserError("nothing was recorded: record more steps")
  rows = []
  for episode in episodes:
    steps = len(episode.actions)
    for start in range(0, steps, stride):
      index = np.arange(start - before + 1, start + after + 1)
      mask = (index >= 0) & (index <= steps)
      acted = (index >= 0) & (index < steps)
      at = np.clip(index, 0, steps - 1)
      rows.append(
        (
          episode.observations[np.clip(index, 0, steps)],
          np.where(acted, episode.actions[at], 0),
          np.where(acted, episode.rewards[at], 0.0).astype(np.float32),
          np.asarray(episode.ends)[at] & acted,
          mask,
        )
      )
  return Segment(*(jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True)))
