"""Scores of the Atari 100k benchmark, relative to random and human play."""

import functools
import importlib.resources
import json
from typing import Any

_ATARI = "atari/"


def human_normalized_score(env_name: str, score: float) -> float | None:
  """(score - random) / (human - random): 0 for random play, 1 for a human.

  Args:
    env_name: such as `atari/Breakout`.
    score: mean undiscounted return of whole games, from raw rewards.

  Returns:
    The normalised score, or None where it is not defined: Catch, and games outside the 26 of Atari 100k.
  """
  table = _published()
  game = env_name.removeprefix(_ATARI)
  if not env_name.startswith(_ATARI) or game not in table["games"]:
    return None
  random, human = table["random"][game], table["human"][game]
  return (score - random) / (human - random)


@functools.cache
def _published() -> dict[str, Any]:
  """`published.json`: `games`, their `random` and `human` scores, and the `source` of those."""
  text = importlib.resources.files("jedi_jax.evaluation").joinpath("published.json").read_text(encoding="utf-8")
  return json.loads(text)
