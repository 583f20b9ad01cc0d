"""Evaluates a policy on an environment by name."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jedi_jax import envs
from jedi_jax.agent import Agent
from jedi_jax.errors import UserError
from jedi_jax.evaluation.episodes import EpisodeResult, Policy, random_policy, run_episodes
from jedi_jax.evaluation.scores import human_normalized_score
from jedi_jax.runs.console import Console


def evaluate(
  policy: Agent | Policy | None,
  env: str,
  *,
  episodes: int = 100,
  num_envs: int = 10,
  seed: int = 2**30,
  max_episode_steps: int = 27_000,
  console: Console | None = None,
  on_step: Callable[[], None] | None = None,
) -> list[EpisodeResult]:
  """Plays whole games under the protocol of Atari 100k: a lost life does not end a game.

  Args:
    policy: an `Agent`, which samples its actions with epsilon 0; any other `Policy`; None for uniform random actions.
    env: name of the environment, as `envs.make` takes it.
    episodes: number of games, at least 1.
    num_envs: environments that play side by side; at most `episodes` are made.
    seed: seed of the environments and of the actions, in [0, 2**31 - num_envs]. Training runs play games with seeds
      below 2**30, so those from 2**30 on, such as the default, give games that no run was trained on.
    max_episode_steps: time limit of a game in environment steps; 27,000 steps are 108,000 Atari frames.
    console: shows progress; None for no output.
    on_step: called before every step of the environments.

  Returns:
    One `EpisodeResult` a game, ordered by environment, then by time; see `run_episodes`.

  Raises:
    UserError: if there is no such environment, a number is out of its range, or the agent has other actions.
  """
  if episodes < 1:
    raise UserError(f"episodes is {episodes}; it must be at least 1")
  num_envs = min(num_envs, episodes)
  vector_env = envs.make(env, num_envs=num_envs, seed=seed, life_loss_ends=False, max_episode_steps=max_episode_steps)
  returns: list[float] = []

  def on_episode(result: EpisodeResult) -> None:
    returns.append(result.return_)
    if console is not None:
      console.show("evaluating, games", len(returns), episodes, f"return {np.mean(returns):.2f}")

  try:
    if policy is None:
      policy = random_policy(vector_env.spec.num_actions, seed)
    elif isinstance(policy, Agent):
      own, found = int(policy.model.num_actions(policy.params)), vector_env.spec.num_actions
      if own != found:
        raise UserError(f"{env} has {found} actions, but the agent was trained with {own}")
      policy = policy.player(num_envs, seed)
    play = policy

    def act(observations: np.ndarray, restart: np.ndarray) -> np.ndarray:
      if on_step is not None:
        on_step()
      return play(observations, restart)

    return run_episodes(vector_env, act, episodes=episodes, on_episode=on_episode)
  finally:
    vector_env.close()


def describe_results(env: str, results: Sequence[EpisodeResult]) -> dict[str, Any]:
  """Summarises games as JSON values.

  Args:
    env: name of the environment.
    results: at least one game.

  Returns:
    'episode_returns', 'episode_lengths' (in steps), 'episodes_truncated' (their number), 'mean_return', and
    'human_normalized_score' (None where it is undefined). result.json and evaluation.json hold these entries.
  """
  returns = [result.return_ for result in results]
  mean = float(np.mean(returns))
  return {
    "episode_returns": returns,
    "episode_lengths": [result.length for result in results],
    "episodes_truncated": sum(result.truncated for result in results),
    "mean_return": mean,
    "human_normalized_score": human_normalized_score(env, mean),
  }
