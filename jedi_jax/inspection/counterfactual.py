"""Whether dreams know what actions would do that the policy does not take: games played again with other actions."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax import envs
from jedi_jax.agent import Agent
from jedi_jax.errors import UserError
from jedi_jax.types import Segment


def play(
  agent: Agent, seed: int, limit: int, forced: list[int] | None = None
) -> tuple[list[np.ndarray], list[int], bool]:
  """Plays one game, with the policy or with forced actions.

  Args:
    agent: an agent with its configuration.
    seed: of the environment and of the policy.
    limit: steps after which the game is not waited for.
    forced: actions to take instead of the policy's, at least `limit`.

  Returns:
    The frames that actions were chosen on and the last action's, the actions, and whether the game was lost within
    `limit` steps.

  Raises:
    UserError: if the agent has no configuration.
  """
  if agent.config is None:
    raise UserError("the agent has no configuration: load it from a run's directory")
  env = envs.make(agent.config.env.name, num_envs=1, seed=seed)
  try:
    observation, policy = env.reset(), agent.player(1, seed)
    frames, actions = [], []
    for t in range(limit):
      chosen = policy(observation, np.asarray([t == 0])) if forced is None else np.asarray(forced[t : t + 1], np.int32)
      frames.append(np.asarray(observation)[0])
      actions.append(int(chosen[0]))
      step = env.step(np.asarray(chosen))
      observation = step.observation
      if step.game_over[0]:
        break
    return [*frames, np.asarray(step.next_observation)[0]], actions, bool(step.end[0])
  finally:
    env.close()


def dream(
  agent: Agent, imagine: Any, frames: list[np.ndarray], actions: list[int], start: int, held: list[int], count: int = 16
) -> float:
  """Returns the share of `count` dreams that end, from the frames up to `start` on, with the actions `held`."""
  length = agent.model.conditioning_frames
  past = slice(start - length + 1, start + 1)

  def repeat(values: Any) -> jax.Array:
    return jnp.repeat(jnp.asarray(values)[None], count, axis=0)

  nothing = jnp.zeros((count, length))
  segment = Segment(
    repeat(np.stack(frames[past])), repeat(np.asarray(actions[past], np.int32)), nothing, nothing > 0, nothing == 0
  )
  keys = jax.random.split(jax.random.key(start), count)
  ends = imagine(agent.params, segment, keys, len(held), repeat(np.asarray(held, np.int32))).ends
  return float(np.asarray(ends).any(axis=1).mean())


def judge(agent: Agent, frames: list[np.ndarray], actions: list[int], start: int) -> float:
  """Returns the probability of an end after `start` that the reward / end model gives to real frames."""
  model, first = agent.model, start - agent.model.conditioning_frames + 1
  images = jnp.asarray(np.stack(frames[first:]))[None]
  latents = model.encode(agent.params, images, jnp.ones(images.shape[:2], bool))
  taken = jnp.asarray(actions[first:], jnp.int32)[None]
  state = model.reward_end.initial_state(1)
  _, logits, _ = model.reward_end.predict(agent.params["reward_end"], latents[:, :-1], taken, latents[:, 1:], state)
  continues = jax.nn.softmax(logits)[0, start - first :, 0]
  return float(1.0 - jnp.prod(continues))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Counts games that an action would continue, and those of them whose dreams end under every such action."""
  games: dict[int, list[dict[str, Any]]] = {}
  for row in rows:
    games.setdefault(row["game"], []).append(row)
  continued = [[row for row in own if not row["ends"]] for own in games.values()]
  continued = [own for own in continued if own]
  where = {"ends": [row for row in rows if row["ends"]], "continues": [row for own in continued for row in own]}
  return {
    "games": len(games),
    "games that an action continues": len(continued),
    "of these, games whose dreams end in nine of ten cases even so": sum(
      all(row["dreamed ends"] >= 0.9 for row in own) for own in continued
    ),
    **{
      f"{kind} where the game {outcome}": statistics.mean(row[kind] for row in own) if own else None
      for outcome, own in where.items()
      for kind in ("dreamed ends", "judged ends")
    },
  }
