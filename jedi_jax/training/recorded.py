"""Recorded episodes in the place of environments and their collector."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jedi_jax import replay as replay_lib
from jedi_jax.episodes import Episode
from jedi_jax.training.collector import CHUNK_SLOTS, Collected


class Recorded:
  """The environments and the collector of a run on data: the first collection returns all episodes, later ones none.

  Args:
    episodes: in order; checked.

  Attributes:
    num_envs: 1, the streams of replay.
    repeats: False, as no environment steps are repeated to continue a run.
    env_steps: steps of the episodes that were collected.
  """

  num_envs = 1
  repeats = False

  def __init__(self, episodes: tuple[Episode, ...]):
    self._episodes = episodes
    self.env_steps = 0

  @property
  def frames(self) -> int:
    """Frames of the game, as far as is known: one a step."""
    return self.env_steps

  def collect(
    self,
    params: Any,
    replay: Any,
    add: Callable[[Any, replay_lib.Chunk], Any],
    steps: int,
    check: Callable[[], None] = lambda: None,
  ) -> tuple[Any, Collected]:
    """Adds all episodes to replay; as `Collector.collect`, with `params` and `steps` unused."""
    del params, steps
    for chunk in replay_lib.chunks(self._episodes, size=CHUNK_SLOTS):
      replay = add(replay, chunk)
      check()
    rewards = np.concatenate([episode.rewards for episode in self._episodes])
    self.env_steps = len(rewards)
    signs = np.bincount(np.sign(rewards).astype(np.int64) + 1, minlength=3)
    returns = [float(np.sum(episode.rewards, dtype=np.float64)) for episode in self._episodes]
    lengths = [len(episode.actions) for episode in self._episodes]
    return replay, Collected(len(rewards), returns, lengths, (int(signs[0]), int(signs[1]), int(signs[2])))

  def save(self) -> dict[str, Any]:
    """Returns the state for `restore`. No call of an environment has to be repeated."""
    return {"calls": np.zeros((), np.int32), "steps": np.asarray(self.env_steps, np.int32)}

  def restore(self, saved: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> bool:
    """Continues from a saved state; the episodes are in the saved replay. Returns True: nothing is new."""
    del check
    self.env_steps = int(saved["steps"])
    return True

  def close(self) -> None:
    """Does nothing."""
