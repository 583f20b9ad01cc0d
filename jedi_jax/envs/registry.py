"""Environments by name: `catch`, `atari/<Game>`, `minatar/<Game>`, and those added by `register`.

`atari/<Game>?skip=<low>-<high>` draws the number of frames per step uniformly from low to high; without it a step takes
four. `minatar/<Game>?sticky=<p>` repeats the previous action with probability p; without it no action is sticky.
"""

import functools
import inspect
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jedi_jax.envs import atari, catch, minatar, skipping
from jedi_jax.envs.pooled import import_envpool
from jedi_jax.errors import UserError, nearest
from jedi_jax.types import EnvSpec, VectorEnv

_ATARI, _MINATAR = "atari/", "minatar/"
RECORDED = "data"
"""Name of the environment of a run that trains on recorded episodes. It cannot be made."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)*")
_SKIP = re.compile(r"skip=([0-9]{1,4})-([0-9]{1,4})")
_STICKY = re.compile(r"sticky=(0(?:\.[0-9]{1,6})?)")
_MEMBERS = ("num_envs", "spec", "frames", "reset", "step", "close")


class _Entry(NamedTuple):
  """An environment of the registry.

  Attributes:
    spec: returns its spec.
    make: takes the keyword arguments of `jedi_jax.envs.make`.
    options: converts the text after `?` of a name to further keyword arguments of `make`, given the name without it;
      None for environments without options.
    check_installed: raises `UserError` if a package that `make` needs is not installed.
  """

  spec: Callable[[], EnvSpec]
  make: Callable[..., VectorEnv]
  options: Callable[[str, str], Mapping[str, Any]] | None = None
  check_installed: Callable[[], object] = lambda: None


_entries: dict[str, _Entry] = {}


def register(
  name: str, spec: EnvSpec | Callable[[], EnvSpec], make: Callable[..., VectorEnv], *, replace: bool = False
) -> None:
  """Adds an environment, which can then be used by its name like any other.

  Registration lasts as long as the process: register before the first use of the name, in every process that uses it.
  For a game that is a Python object with `reset` and `step`, see `BatchEnv`.

  Args:
    name: letters, digits, `_`, `-` and `.`, in parts separated by `/`, such as `my/corridor`; not `atari/...` or
      `minatar/...`.
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
  for prefix, owner in ((_ATARI, "EnvPool"), (_MINATAR, "gymnax")):
    if name.startswith(prefix):
      raise UserError(f"environment name {name!r}: names that begin with {prefix!r} are {owner}'s; choose another")
  if name == RECORDED:
    raise UserError(f"environment name {name!r} stands for recorded episodes; choose another")
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
  """Returns the registered environments in order of registration, `catch` first, then `atari/<Game>`, `minatar/<Game>`.

  Atari games are included only if EnvPool is installed; each of them also takes `?skip=`. The MinAtar games are
  included without gymnax too; each of them also takes `?sticky=`.
  """
  return (*_entries, *(_ATARI + game for game in atari.games() or ()), *(_MINATAR + game for game in minatar.SPECS))


def validate(name: str) -> None:
  """Checks that an environment of this name exists; without EnvPool, every name that begins with `atari/` passes.

  Args:
    name: such as `atari/Breakout`, `atari/Breakout?skip=2-6` or `minatar/Breakout?sticky=0.1`; case matters.

  Raises:
    UserError: it does not exist; the message suggests the nearest names or describes the mistake in the option.
  """
  _parse(name)


def check_installed(name: str) -> None:
  """Checks that the packages that an environment needs are installed.

  Raises:
    UserError: there is no such environment, or a package that it needs is not installed.
  """
  _parse(name)[0].check_installed()


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
    seed: environment i is seeded with `seed + i`, once, its random skips and sticky actions too; `seed` in
      [0, 2**31 - N]. Keep the ranges of training and evaluation disjoint.
    life_loss_ends: whether a lost life ends the training episode although the game continues (Atari; no effect on
      Catch and MinAtar). True in training, false in evaluation, which plays whole games.
    max_episode_steps: steps after which a game is truncated; None means the game's own limit: 27,000 for Atari (108,000
      frames), 1,000 for MinAtar (2,500 for Freeway; never more), none for Catch, whose games take 9.
    num_threads: emulator threads; 0 lets EnvPool choose.

  Returns:
    The environments; call `reset` once, then `step`.

  Raises:
    UserError: there is no such environment, a number is out of its range, a package that it needs is not installed, or
      a registered `make` returned something else than N environments of the registered spec.
  """
  entry, options = _parse(name)
  env = entry.make(
    num_envs=num_envs,
    seed=seed,
    life_loss_ends=life_loss_ends,
    max_episode_steps=max_episode_steps,
    num_threads=num_threads,
    **options,
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
  low, high = _parse(name)[1].get("skip", (0, 0))
  return bool(low != high)


def _parse(name: str) -> tuple[_Entry, Mapping[str, Any]]:
  """Returns the entry of an environment, and the keyword arguments of its `make` that the name adds."""
  base, question, query = str(name).partition("?")
  entry = _find(base)
  if entry is None:
    raise UserError(f"unknown environment {name!r}{nearest(base, names())}")
  if not question:
    return entry, {}
  if entry.options is None:
    raise UserError(f"environment {name!r}: {base} takes no options; write {base!r}")
  try:
    return entry, entry.options(base, query)
  except UserError as error:
    raise UserError(f"environment {name!r}: {error}") from None


def _skip(base: str, query: str) -> Mapping[str, Any]:
  match = _SKIP.fullmatch(query)
  if match is None:
    example = f"{base}?skip=2-6"
    raise UserError(f"{query!r} is no range of frames per step; write it like {example!r}")
  low, high = int(match[1]), int(match[2])
  skipping.check_skip(low, high)
  return {"skip": (low, high)}


def _sticky(base: str, query: str) -> Mapping[str, Any]:
  match = _STICKY.fullmatch(query)
  if match is None:
    example = f"{base}?sticky=0.1"
    raise UserError(f"{query!r} is no probability of sticky actions in [0, 1); write it like {example!r}")
  return {"sticky": float(match[1])}


def _find(name: str) -> _Entry | None:
  """Returns the entry of a name without options, None if there is none."""
  if name == RECORDED:
    return _Entry(_refuse_recorded, _refuse_recorded)
  if name.startswith(_MINATAR):
    game = name.removeprefix(_MINATAR)
    return _minatar_entry(game) if game in minatar.SPECS else None
  if not name.startswith(_ATARI):
    return _entries.get(name)
  game, games = name.removeprefix(_ATARI), atari.games()
  if games is not None and game not in games:
    return None
  spec, make = functools.partial(atari.game_spec, game), functools.partial(atari.AtariEnv, game)
  return _Entry(spec, make, _skip, import_envpool)


def _refuse_recorded(**options: Any) -> Any:
  """Stands for the spec and the constructor of recorded episodes."""
  del options
  raise UserError(
    f"environment {RECORDED!r} stands for recorded episodes, which cannot be played: train on them with "
    "experiments/train_offline.py, and name an environment (--env) to evaluate in"
  )


def _minatar_entry(game: str) -> _Entry:
  make = functools.partial(minatar.MinAtarEnv, game)
  return _Entry(lambda: minatar.SPECS[game], make, _sticky, minatar.import_gymnax)


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


_entries["catch"] = _Entry(lambda: catch.SPEC, _make_catch, check_installed=import_envpool)
