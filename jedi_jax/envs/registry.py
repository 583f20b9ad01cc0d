"""Environments by name: `catch`, those added by `register`, and the families `<family>/<name>`.

The families are `atari`, `procgen`, `vizdoom` and `minigrid` (EnvPool), `minatar` and `gymnax` (gymnax) and `gym`
(Gymnasium).
`atari/<Game>?skip=<low>-<high>` draws the number of frames per step uniformly from low to high; without it a step takes
four. `minatar/<Game>?sticky=<p>` repeats the previous action with probability p; without it no action is sticky.
`gymnax/<Id>?scale=<n>&sticky=<p>` draws every pixel n times along both axes.
`gym/<id>?crop=<rows>x<columns>&size=<pixels>` crops and resizes images.
"""

import functools
import inspect
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jedi_jax.envs import atari, catch, gym, gymnax, pixels, skipping
from jedi_jax.envs.pooled import import_envpool
from jedi_jax.errors import UserError, nearest
from jedi_jax.types import EnvSpec, VectorEnv

RECORDED = "data"
"""Name of the environment of a run that trains on recorded episodes. It cannot be made."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)*")
_SKIP = re.compile(r"skip=([0-9]{1,4})-([0-9]{1,4})")
_STICKY = re.compile(r"sticky=(0(?:\.[0-9]{1,6})?)")
_SCALE = re.compile(r"scale=([1-9][0-9]?)")
_SIZE = re.compile(r"size=([1-9][0-9]{0,3})(?:x([1-9][0-9]{0,3}))?")
_CROP = re.compile(r"crop=([0-9]{1,4})-([0-9]{1,4})x([0-9]{1,4})-([0-9]{1,4})")
_MEMBERS = ("num_envs", "spec", "frames", "reset", "step", "close")


class _Entry(NamedTuple):
  """An environment of the registry.

  Attributes:
    spec: returns its spec; takes the keyword arguments that `options` returns.
    make: takes the keyword arguments of `jedi_jax.envs.make`.
    options: converts the text after `?` of a name to further keyword arguments of `make` and `spec`, given the name
      without it; None for environments without options.
    check_installed: raises `UserError` if a package that `make` needs is not installed.
  """

  spec: Callable[..., EnvSpec]
  make: Callable[..., VectorEnv]
  options: Callable[[str, str], Mapping[str, Any]] | None = None
  check_installed: Callable[[], object] = lambda: None


class _Family(NamedTuple):
  """Environments whose names have the same first part.

  Attributes:
    owner: the package that defines them.
    names: returns the second parts of their names; None if the package is not installed, and then every name passes.
    entry: returns the entry of a second part.
    listed: whether `names` of this module has them.
  """

  owner: str
  names: Callable[[], tuple[str, ...] | None]
  entry: Callable[[str], _Entry]
  listed: bool = True


_entries: dict[str, _Entry] = {}


def register(
  name: str, spec: EnvSpec | Callable[[], EnvSpec], make: Callable[..., VectorEnv], *, replace: bool = False
) -> None:
  """Adds an environment, which can then be used by its name like any other.

  Registration lasts as long as the process: register before the first use of the name, in every process that uses it.
  For a game that is a Python object with `reset` and `step`, see `BatchEnv`.

  Args:
    name: letters, digits, `_`, `-` and `.`, in parts separated by `/`, such as `my/corridor`; the first
      of several parts is no family, such as `atari`.
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
  for family, own in _FAMILIES.items():
    if name.startswith(f"{family}/"):
      raise UserError(f"environment name {name!r}: names that begin with '{family}/' are {own.owner}'s; choose another")
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
  """Returns the registered environments in order of registration, `catch` first, then those of the families.

  Atari games and EnvPool's other families are included only if EnvPool is installed; an Atari game also takes `?skip=`.
  The MinAtar games are included without gymnax too; each of them also takes `?sticky=`. The environments `gym/<id>` and
  `gymnax/<Id>` are not included: most of those that come with Gymnasium and gymnax have no images.
  """
  return (*_entries, *(name for family, own in _FAMILIES.items() if own.listed for name in _full_names(family)))


def validate(name: str) -> None:
  """Checks that an environment of this name exists; if the package of its family is not installed, every name passes.

  Args:
    name: such as `atari/Breakout`, `atari/Breakout?skip=2-6`, `minatar/Breakout?sticky=0.1`, `gymnax/Pong-misc` or
      `gym/my/Maze-v0?size=64`; case matters. An id of Gymnasium includes its version. Your own are registered with
      Gymnasium or gymnax before.

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

  One environment of Gymnasium is made and closed at the first call.

  Args:
    name: see `validate`.

  Raises:
    UserError: there is no such environment, a package that it needs is not installed, its actions are not discrete, or
      its observations are no images.
  """
  entry, options = _parse(name)
  return entry.spec(**options)


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
      frames), none for Catch, whose games take 9. Other families have limits of their own, such as 1,000 steps in most
      MinAtar games, which it only lowers.
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
  for member, found, expected in (("num_envs", env.num_envs, num_envs), ("spec", env.spec, entry.spec(**options))):
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
  family = base.partition("/")[0]
  if entry is None and "/" in base and family in _FAMILIES and not _FAMILIES[family].listed:
    cure = "; a package registers its environments with --import=my_package or when it is imported"
    raise UserError(f"unknown environment {name!r}{nearest(base, _full_names(family))}{cure}")
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


def _sticky_and_scale(base: str, query: str) -> Mapping[str, Any]:
  options: dict[str, Any] = {}
  for part in query.split("&"):
    if (match := _STICKY.fullmatch(part)) and "sticky" not in options:
      options["sticky"] = float(match[1])
    elif (match := _SCALE.fullmatch(part)) and "scale" not in options:
      options["scale"] = int(match[1])
    else:
      example = f"{base}?scale=4&sticky=0.1"
      raise UserError(f"{part!r} is no scale in 1..99 and no sticky in [0, 1); write it like {example!r}")
  return options


def _view(base: str, query: str) -> Mapping[str, Any]:
  view = gym.View()
  for part in query.split("&"):
    if (match := _SIZE.fullmatch(part)) and view.size is None:
      view = view._replace(size=(int(match[1]), int(match[2] or match[1])))
    elif (match := _CROP.fullmatch(part)) and view.crop is None:
      top, bottom, left, right = map(int, match.groups())
      view = view._replace(crop=(top, bottom, left, right))
    else:
      example = f"{base}?crop=34-194x0-160&size=64"
      raise UserError(f"{part!r} is no crop (rows x columns) or size in pixels; write it like {example!r}")
  return {"view": view}


def _full_names(family: str) -> tuple[str, ...]:
  return tuple(f"{family}/{name}" for name in _FAMILIES[family].names() or ())


def _find(name: str) -> _Entry | None:
  """Returns the entry of a name without options, None if there is none."""
  if name == RECORDED:
    return _Entry(_refuse_recorded, _refuse_recorded)
  family, _, own_name = name.partition("/")
  if not own_name or family not in _FAMILIES:
    return _entries.get(name)
  known = _FAMILIES[family].names()
  return None if known is not None and own_name not in known else _FAMILIES[family].entry(own_name)


def _atari_entry(game: str) -> _Entry:
  make = functools.partial(atari.AtariEnv, game)
  return _Entry(lambda **_: atari.game_spec(game), make, _skip, import_envpool)


def _refuse_recorded(**options: Any) -> Any:
  """Stands for the spec and the constructor of recorded episodes."""
  del options
  raise UserError(
    f"environment {RECORDED!r} stands for recorded episodes, which cannot be played: train on them with "
    "experiments/train_offline.py, and name an environment (--env) to evaluate in"
  )


def _minatar_entry(game: str) -> _Entry:
  make = functools.partial(gymnax.GymnaxEnv, f"{game}-MinAtar", scale=1)
  return _Entry(lambda **_: gymnax.MINATAR[game], make, _sticky, gymnax.import_gymnax)


def _if_installed(ids: Callable[[], tuple[str, ...]]) -> Callable[[], tuple[str, ...] | None]:
  """Returns a function that returns what `ids` returns, and None where it raises `UserError`."""

  def found() -> tuple[str, ...] | None:
    try:
      return ids()
    except UserError:
      return None

  return found


def _gymnax_entry(env_id: str) -> _Entry:
  spec = functools.partial(gymnax.game_spec, env_id)
  return _Entry(spec, functools.partial(gymnax.GymnaxEnv, env_id), _sticky_and_scale, gymnax.import_gymnax)


def _pixels_entry(family: str, name: str) -> _Entry:
  spec = functools.partial(pixels.task_spec, family, name)
  return _Entry(spec, functools.partial(pixels.PixelEnv, family, name), check_installed=spec)


def _gym_entry(env_id: str) -> _Entry:
  def spec(view: gym.View = gym.View()) -> EnvSpec:
    return gym.game_spec(env_id, view)

  return _Entry(spec, functools.partial(gym.GymEnv, env_id), _view, gym.import_gymnasium)


_FAMILIES: Mapping[str, _Family] = {
  "atari": _Family("EnvPool", atari.games, _atari_entry),
  **{
    family: _Family("EnvPool", own.names, functools.partial(_pixels_entry, family))
    for family, own in pixels.FAMILIES.items()
  },
  "minatar": _Family("gymnax", lambda: tuple(gymnax.MINATAR), _minatar_entry),
  "gymnax": _Family("gymnax", _if_installed(gymnax.ids), _gymnax_entry, listed=False),
  "gym": _Family("Gymnasium", _if_installed(gym.ids), _gym_entry, listed=False),
}


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
