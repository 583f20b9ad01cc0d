"""Environments by name: `catch`, `atari/<Game>` and `atari/<Game>?skip=<low>-<high>`.

The last is the game with a random number of frames a step, drawn uniformly from low to high; without it there are
four.
"""

import functools
import re

from jedi_jax.envs import atari, catch, skipping
from jedi_jax.errors import UserError, nearest
from jedi_jax.types import EnvSpec, VectorEnv

_CATCH = "catch"
_ATARI = "atari/"
_SKIP = re.compile(r"skip=([0-9]{1,4})-([0-9]{1,4})")


@functools.cache
def names() -> tuple[str, ...]:
  """All environments: `catch`, then `atari/<Game>` in alphabetical order. Every game takes `?skip=` besides."""
  return (_CATCH, *(_ATARI + game for game in atari.games()))


def validate(name: str) -> None:
  """Checks that there is an environment of this name.

  Args:
    name: such as `atari/Breakout` or `atari/Breakout?skip=2-6`; case matters.

  Raises:
    UserError: there is none; the message suggests the nearest names or says what is wrong with the skip.
  """
  _parse(name)


@functools.cache
def spec(name: str) -> EnvSpec:
  """Number of actions and observation shape of an environment, without starting any.

  Args:
    name: see `validate`.

  Returns:
    The spec that the environments of `make` have.

  Raises:
    UserError: there is no such environment.
  """
  game, _ = _parse(name)
  return catch.SPEC if game is None else atari.game_spec(game)


def make(
  name: str,
  *,
  num_envs: int,
  seed: int,
  life_loss_ends: bool,
  max_episode_steps: int | None = None,
  num_threads: int = 0,
) -> VectorEnv:
  """Makes N copies of an environment.

  Args:
    name: see `validate`.
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i`, for good, its random skips too; `seed` in [0, 2**31 - N]. Keep the
      ranges of training and evaluation apart.
    life_loss_ends: whether a lost life ends the training episode though the game goes on (Atari; without effect on
      Catch). True in training, false in evaluation, which plays whole games.
    max_episode_steps: steps after which a game is truncated; None means the game's own: 27,000 for Atari (108,000
      frames), none for Catch, whose games take 9.
    num_threads: emulator threads; 0 leaves the choice to EnvPool.

  Returns:
    The environments; call `reset` once, then `step`.

  Raises:
    UserError: there is no such environment, or a number is out of its range.
  """
  game, skip = _parse(name)
  if game is None:
    return catch.CatchEnv(num_envs=num_envs, seed=seed, max_episode_steps=max_episode_steps, num_threads=num_threads)
  return atari.AtariEnv(
    game,
    num_envs=num_envs,
    seed=seed,
    life_loss_ends=life_loss_ends,
    max_episode_steps=max_episode_steps,
    num_threads=num_threads,
    skip=skip,
  )


def is_stochastic(name: str) -> bool:
  """Whether the frame skip of an environment is random.

  Raises:
    UserError: there is no such environment.
  """
  _, skip = _parse(name)
  return skip is not None and skip[0] != skip[1]


def _parse(name: str) -> tuple[str | None, tuple[int, int] | None]:
  """Atari game, None for Catch, and range of its random skip, None for the fixed one; see `validate`."""
  base, question, query = str(name).partition("?")
  if base not in names():
    raise UserError(f"unknown environment {name!r}{nearest(base, names())}")
  game = None if base == _CATCH else base.removeprefix(_ATARI)
  if not question:
    return game, None
  if game is None:
    raise UserError(f"environment {name!r}: {base} takes no options; write {base!r}")
  match = _SKIP.fullmatch(query)
  if match is None:
    example = f"{base}?skip=2-6"
    raise UserError(f"environment {name!r}: {query!r} is no range of frames a step; write it like {example!r}")
  low, high = int(match[1]), int(match[2])
  try:
    skipping.check_skip(low, high)
  except UserError as error:
    raise UserError(f"environment {name!r}: {error}") from None
  return game, (low, high)
