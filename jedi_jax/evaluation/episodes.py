"""Plays whole games with a policy."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jedi_jax.errors import UserError
from jedi_jax.types import Policy, VectorEnv


class EpisodeResult(NamedTuple):
  """One whole game.

  Attributes:
    env: index of the environment.
    return_: undiscounted sum of raw rewards.
    length: number of environment steps.
    truncated: whether the time limit ended the game.
  """

  env: int
  return_: float
  length: int
  truncated: bool


def run_episodes(
  env: VectorEnv,
  policy: Policy,
  *,
  episodes: int,
  on_episode: Callable[[EpisodeResult], None] | None = None,
) -> list[EpisodeResult]:
  """Plays a fixed number of whole games.

  Each environment plays a fixed share of the games; the shares differ by at most one. Games beyond the share do not
  count. Counting the first games to finish instead would favour short games.

  Args:
    env: N environments. This function resets them and does not close them. A game ends with `game_over`; a lost life
      does not end it.
    policy: see `Policy`.
    episodes: number of games over all environments, at least 1.
    on_episode: called with each counted game when it ends.

  Returns:
    `episodes` results, ordered by environment, then by time.

  Raises:
    UserError: `episodes` is less than 1.
  """
  if episodes < 1:
    raise UserError(f"episodes is {episodes}; it must be at least 1")
  n = env.num_envs
  shared, extra = divmod(episodes, n)
  quota = [shared + (i < extra) for i in range(n)]
  results: list[list[EpisodeResult]] = [[] for _ in range(n)]
  returns = np.zeros(n, np.float64)
  lengths = np.zeros(n, np.int64)

  observations = env.reset()
  restart = np.ones(n, bool)
  while any(len(played) < wanted for played, wanted in zip(results, quota, strict=True)):
    step = env.step(policy(observations, restart))
    observations, restart = step.observation, step.game_over
    returns += step.reward
    lengths += 1
    for i in np.flatnonzero(step.game_over).tolist():
      if len(results[i]) < quota[i]:
        result = EpisodeResult(i, float(returns[i]), int(lengths[i]), bool(step.truncated[i]))
        results[i].append(result)
        if on_episode is not None:
          on_episode(result)
      returns[i], lengths[i] = 0.0, 0
  return [result for played in results for result in played]


def random_policy(num_actions: int, seed: int) -> Policy:
  """Makes a policy that draws each action independently and uniformly from [0, num_actions).

  Args:
    num_actions: A.
    seed: the same seed gives the same sequence of actions.
  """
  generator = np.random.default_rng(seed)

  def act(observations: np.ndarray, restart: np.ndarray) -> np.ndarray:
    del restart
    return generator.integers(num_actions, size=len(observations))

  return act
