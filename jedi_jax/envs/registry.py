"""Environments by name: `catch` and `atari/<Game>`."""

import functools

from jedi_jax.envs import atari, catch
from jedi_jax.errors import UserError, nearest
from jedi_jax.types import EnvSpec, VectorEnv

_CATCH = "catch"
_ATARI = "atari/"


@functools.cache
def names() -> tuple[str, ...]:
  """All environments: `catch`, then `atari/<Game>` in alphabetical order."""
  return (_CATCH, *(_ATARI + game for game in atari.games()))


def validate(name: str) -> None:
  """Checks that there is an environment of this name.

  Args:
    name: such as `atari/Breakout`; case matters.

  Raises:
    UserError: there is none; the message suggests the nearest names.
  """
  if name not in names():
    raise UserError(f"unknown environment {name!r}{nearest(str(name), names())}")


@functools.cache
def spec(name: str) -> EnvSpec:
  """Number of actions and observation shape of an environment, without starting any.

  Args:
    name: one of `names()`.

  Returns:
    The spec that the environments of `make` have.

  Raises:
    UserError: there is no such environment.
  """
  validate(name)
  return catch.SPEC if name == _CATCH else atari.game_spec(name.removeprefix(_ATARI))


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
    name: one of `names()`.
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i`, for good; `seed` in [0, 2**31 - N]. Keep the ranges of training and
      evaluation apart.
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
  validate(name)
  if name == _CATCH:
    return catch.CatchEnv(num_envs=num_envs, seed=seed, max_episode_steps=max_episode_steps, num_threads=num_threads)
  return atari.AtariEnv(
    name.removeprefix(_ATARI),
    num_envs=num_envs,
    seed=seed,
    life_loss_ends=life_loss_ends,
    max_episode_steps=max_episode_steps,
    num_threads=num_threads,
  )
