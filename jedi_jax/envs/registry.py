"""Environments by name: `catch`, `atari/<Game>`, `atari/<Game>?skip=<low>-<high>`, and those added by `register`.

With `?skip=` the number of frames per step is drawn uniformly from low to high; without it a step takes four.
"""

import functools
import inspect
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jedi_jax.envs import atari, catch, skipping
from jedi_jax.envs.pooled import import_envpool
from jedi_jax.errors import UserError, nearest
from jedi_jax.types import EnvSpec, VectorEnv

_ATARI = "atari/"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)*")
_SKIP = re.compile(r"skip=([0-9]{1,4})-([0-9]{1,4})")
_MEMBERS = ("num_envs", "spec", "frames", "reset", "step", "close")


class _Entry(NamedTuple):
  """An environment of the registry.

  Attributes:
    spec: returns its spec.
    make: takes the keyword arguments of `jedi_jax.envs.make`.
    takes_skip: whether `make` takes `skip` as well.
    needs_envpool: whether `make` needs EnvPool.
  """

  spec: Callable[[], EnvSpec]
  make: Callable[..., VectorEnv]
  takes_skip: bool = False
  needs_envpool: bool = False


_entries: dict[str, _Entry] = {}


def register(
  name: str, spec: EnvSpec | Callable[[], EnvSpec], make: Callable[..., VectorEnv], *, replace: bool = False
) -> None:
  """Adds an environment, which can then be used by its name like any other.

  Registration lasts as long as the process: register before the first use of the name, in every process that uses it.
  For a game that is a Python object with `reset` and `step`, see `BatchEnv`.

  Args:
    name: letters, digits, `_`, `-` and `.`, in parts separated by `/`, such as `my/corridor`; not `atari/...`.
    spec: number of actions and observation shape; or a function that returns them, called at the first use.
    make: called with the keyword arguments num_envs, seed, life_loss_ends, max_episode_steps and num_threads, which
      `jedi_jax.envs.make` describes; one that needs only the first two is written `make(*, num_envs, seed, **options)`.
      It returns environments as `jedi_jax.types.VectorEnv` describes.
    replace: whether an environment of this name is replaced; otherwise it is an error.

  Raises:
    UserError: the name is malformed or taken, the spec is not that of a discrete action set and uint8 images, or
      `make` does not accept the arguments above.
  """
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise UserError(f"environment name {name!r}: write letters, digits, '_', '-' and '.', in parts separated by '/'")
  if name.startswith(_ATARI):
    raise UserError(f"environment name {name!r}: names that begin with {_ATARI!r} are EnvPool's; choose another")
  if name in _entries and not replace:
    raise UserError(f"environment {name!r} is registered already; choose another name or pass replace=True")
  try:
    inspect.signature(make).bind(num_envs=1, seed=0, life_loss_ends=True, max_episode_steps=None, num_threads=0)
  except (TypeError, ValueError) as error:
    raise UserError(f"environment {name!r}: {error}; define make(*, num_envs, seed, **options)") from None
  if callable(spec):
    _entries[name] = _Entry(functools.cache(lambda: _checked_spec(name, spec())), make)
  else:
    checked = _checked_spec(name, spec)
    _entries[name] = _Entry(lambda: checked, make)


def names() -> tuple[str, ...]:
  """Returns the registered environments in order of registration, `catch` first, then `atari/<Game>`, sorted.

  Atari games are included only if EnvPool is installed; each of them also takes `?skip=`.
  """
  return (*_entries, *(_ATARI + game for game in atari.games() or ()))


def validate(name: str) -> None:
  """Checks that an environment of this name exists; without EnvPool, every name that begins with `atari/` passes.

  Args:
    name: such as `atari/Breakout` or `atari/Breakout?skip=2-6`; case matters.

  Raises:
    UserError: it does not exist; the message suggests the nearest names or describes the mistake in the skip.
  """
  _parse(name)


def check_installed(name: str) -> None:
  """Checks that the packages that an environment needs are installed.

  Raises:
    UserError: there is no such environment, or EnvPool is needed and not installed.
  """
  if _parse(name)[0].needs_envpool:
    import_envpool()


def spec(name: str) -> EnvSpec:
  """Returns the number of actions and the observation shape of an environment; no game is started.

  Args:
    name: see `validate`.

  Raises:
    UserError: there is no such environment, or EnvPool is needed and not installed.
  """
  return _parse(name)[0].spec()


def make(
  name: str,
  *,
  num_envs: int,
  seed: int,
  life_loss_ends: bool = False,
  max_episode_steps: int | None = None,
  num_threads: int = 0,
) -> VectorEnv:
  """Makes N copies of an environment.

  Args:
    name: see `validate`.
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i`, once, its random skips too; `seed` in [0, 2**31 - N]. Keep the ranges
      of training and evaluation disjoint.
    life_loss_ends: whether a lost life ends the training episode although the game continues (Atari; no effect on
      Catch). True in training, false in evaluation, which plays whole games.
    max_episode_steps: steps after which a game is truncated; None means the game's own limit: 27,000 for Atari (108,000
      frames), none for Catch, whose games take 9.
    num_threads: emulator threads; 0 lets EnvPool choose.

  Returns:
    The environments; call `reset` once, then `step`.

  Raises:
    UserError: there is no such environment, a number is out of its range, EnvPool is needed and not installed, or a
      registered `make` returned something else than N environments of the registered spec.
  """
  entry, skip = _parse(name)
  env = entry.make(
    num_envs=num_envs,
    seed=seed,
    life_loss_ends=life_loss_ends,
    max_episode_steps=max_episode_steps,
    num_threads=num_threads,
    **({} if skip is None else {"skip": skip}),
  )
  missing = [member for member in _MEMBERS if not hasattr(env, member)]
  if missing:
    raise UserError(f"environment {name!r}: make returned a {type(env).__name__} without {', '.join(missing)}")
  for member, found, expected in (("num_envs", env.num_envs, num_envs), ("spec", env.spec, entry.spec())):
    if found != expected:
      env.close()
      raise UserError(f"environment {name!r}: make returned environments with {member} {found}, not {expected}")
  return env


def is_stochastic(name: str) -> bool:
  """Returns whether the frame skip of an environment is random.

  Raises:
    UserError: there is no such environment.
  """
  skip = _parse(name)[1]
  return skip is not None and skip[0] != skip[1]


def _parse(name: str) -> tuple[_Entry, tuple[int, int] | None]:
  """Returns the entry of an environment and the range of its frame skip, None if the name has none."""
  base, question, query = str(name).partition("?")
  entry = _find(base)
  if entry is None:
    raise UserError(f"unknown environment {name!r}{nearest(base, names())}")
  if not question:
    return entry, None
  if not entry.takes_skip:
    raise UserError(f"environment {name!r}: {base} takes no options; write {base!r}")
  match = _SKIP.fullmatch(query)
  if match is None:
    example = f"{base}?skip=2-6"
    raise UserError(f"environment {name!r}: {query!r} is no range of frames per step; write it like {example!r}")
  low, high = int(match[1]), int(match[2])
  try:
    skipping.check_skip(low, high)
  except UserError as error:
    raise UserError(f"environment {name!r}: {error}") from None
  return entry, (low, high)


def _find(name: str) -> _Entry | None:
  """Returns the entry of a name without options, None if there is none."""
  if not name.startswith(_ATARI):
    return _entries.get(name)
  game, games = name.removeprefix(_ATARI), atari.games()
  if games is not None and game not in games:
    return None
  spec, make = functools.partial(atari.game_spec, game), functools.partial(atari.AtariEnv, game)
  return _Entry(spec, make, takes_skip=True, needs_envpool=True)


def _checked_spec(name: str, spec: Any) -> EnvSpec:
  try:
    num_actions, shape = spec
    sizes = [operator.index(size) for size in (num_actions, *shape)]  # NumPy's integers become Python's.
  except (TypeError, ValueError):
    sizes = []
  if len(sizes) != 4 or min(sizes) < 1:
    raise UserError(
      f"environment {name!r}: spec is {spec!r}; it must be EnvSpec(num_actions, (height, width, channels)) "
      "with integers of at least 1"
    )
  num_actions, height, width, channels = sizes
  return EnvSpec(num_actions, (height, width, channels))


def _make_catch(*, life_loss_ends: bool, **options: Any) -> VectorEnv:
  del life_loss_ends  # Catch has no lives.
  return catch.CatchEnv(**options)


_entries["catch"] = _Entry(lambda: catch.SPEC, _make_catch, needs_envpool=True)
