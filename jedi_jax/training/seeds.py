"""Seeds: derives an independent seed for each purpose from the seed of a run."""

import enum

import numpy as np


class Purpose(enum.IntEnum):
  """What a seed is for. The numbers determine every run, so new purposes come last."""

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
  """Derives an environment's seed: below 2^29 for collection, from 2^30 on otherwise, so that they share no game."""
  return derive(seed, purpose, index) // 2 + (0 if purpose == Purpose.COLLECTION else 2**30)


def evaluation_seed(seed: int) -> int:
  """Derives the seed of a separate evaluation, which shares no game with training."""
  return env_seed(seed, Purpose.SEPARATE)
