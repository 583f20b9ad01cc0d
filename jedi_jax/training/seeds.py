"""Seeds: one of the run gives independent ones for each purpose."""

import enum

import numpy as np


class Purpose(enum.IntEnum):
  """What a seed is for; the numbers are part of every run, so new purposes come last."""

  TRAINING = 0
  COLLECTION = 1
  EVALUATION = 2
  FINAL = 3
  SEPARATE = 4
  DREAMS = 5


def derive(seed: int, *purpose: int) -> int:
  """Derives an independent seed in [0, 2^30)."""
  return int(np.random.SeedSequence([seed, *purpose]).generate_state(1)[0] % 2**30)


def env_seed(seed: int, purpose: Purpose, index: int = 0) -> int:
  """Derives an environment's seed: below 2^29 for collection, above 2^30 for evaluation, so that no game is shared."""
  return derive(seed, purpose, index) // 2 + (0 if purpose == Purpose.COLLECTION else 2**30)


def evaluation_seed(seed: int) -> int:
  """Derives the seed of a separate evaluation; its games are none of training."""
  return env_seed(seed, Purpose.SEPARATE)
