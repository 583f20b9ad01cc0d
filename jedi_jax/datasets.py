"""Data sets of recorded episodes on disk: one `.npz` file an episode, and `dataset.json`.

docs/data.md describes the format. Files are read as arrays only; nothing in them is executed.
"""

import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jedi_jax import config as config_lib
from jedi_jax import replay as replay_lib
from jedi_jax.config import Config
from jedi_jax.envs import RECORDED
from jedi_jax.episodes import Episode, check_episode
from jedi_jax.errors import UserError
from jedi_jax.runs import checkpoint, workdir
from jedi_jax.runs.workdir import Workdir
from jedi_jax.types import EnvSpec

VERSION = 1
"""Version of the format."""
FIELDS = ("observations", "actions", "rewards", "terminated", "truncated")
"""Arrays of an episode's file."""

_INFO = "dataset.json"
_HELD_OUT = 10  # One of so many episodes is held out.
_MAX_BYTES = 4 << 30  # Of one episode in memory.
_MIN_CAPACITY = 1_024  # Frames of a replay, so that small data sets share a compiled program.


class Dataset(NamedTuple):
  """A data set in memory.

  Attributes:
    path: its directory.
    spec: number of actions and observation shape.
    episodes: in order of the names of their files; at least two.
    source: what was recorded, such as the name of an environment; may be empty.
  """

  path: pathlib.Path
  spec: EnvSpec
  episodes: tuple[Episode, ...]
  source: str = ""

  @property
  def training(self) -> tuple[Episode, ...]:
    """The episodes to train on: all but the last tenth."""
    return self.episodes[: -max(len(self.episodes) // _HELD_OUT, 1)]

  @property
  def held_out(self) -> tuple[Episode, ...]:
    """The last tenth of the episodes, rounded down, at least one; for films and diagnosis."""
    return self.episodes[len(self.training) :]

  @property
  def steps(self) -> int:
    """Steps of the episodes to train on."""
    return sum(len(episode.actions) for episode in self.training)

  @property
  def frames(self) -> int:
    """Frames of the episodes to train on, which are one more than steps in each."""
    return self.steps + len(self.training)

  def record(self) -> dict[str, Any]:
    """Returns what a run records of its data, as JSON values; 'fingerprint' identifies the content."""
    content = hashlib.sha256(repr(self.spec).encode())
    for observations, actions, rewards, ends in self.episodes:
      content.update(np.ascontiguousarray(observations).data)
      content.update(np.asarray(actions, "<i8").data)
      content.update(np.asarray(rewards, "<f4").data)
      content.update(bytes([bool(ends)]))
    return {
      "directory": str(self.path),
      "source": self.source,
      "episodes": len(self.training),
      "steps": self.steps,
      "held_out": len(self.held_out),
      "fingerprint": content.hexdigest(),
    }


def write(
  directory: str | os.PathLike[str], episodes: Iterable[Any], *, num_actions: int, source: str = ""
) -> tuple[int, int]:
  """Writes a data set. The directory appears when it is complete; after an error there is none.

  Args:
    directory: new or empty.
    episodes: `Episode`s, or mappings or other named tuples with its fields; consumed one at a time. Episodes of Atari
      may be single lives.
    num_actions: size of the discrete action set.
    source: what was recorded, such as the name of an environment.

  Returns:
    Number of episodes and of steps.

  Raises:
    UserError: if the directory is not empty or cannot be written, if there are no episodes, or if one has wrong shapes,
      dtypes or actions.
  """
  path = workdir.locate(directory)
  temporary = path.with_name(f".{path.name}.tmp")
  count = steps = 0
  shape: tuple[int, ...] = ()
  try:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
      raise UserError(f"{path} is not an empty directory: name a new one")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for count, given in enumerate(episodes, 1):
      name = f"episode {count - 1}"
      observations, actions, rewards, ends = check_episode(name, given)
      shape = shape or observations.shape[1:]
      _check_values(name, observations, actions, rewards, EnvSpec(num_actions, shape))  # type: ignore[arg-type]
      np.savez_compressed(
        temporary / f"episode_{count - 1:06d}.npz",
        observations=observations,
        actions=np.asarray(actions, np.int32),
        rewards=np.asarray(rewards, np.float32),
        terminated=np.asarray(ends),
        truncated=np.asarray(not ends),
      )
      steps += len(actions)
    if not count:
      raise UserError("there are no episodes to write: give at least one")
    info = {
      "version": VERSION,
      "observation_shape": [int(size) for size in shape],
      "num_actions": int(num_actions),
      "source": source,
    }
    workdir.write_json(temporary / _INFO, info)
    temporary.replace(path)
  except OSError as error:
    raise UserError(f"cannot write {path}: {error.strerror or error}") from None
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return count, steps


def read(directory: str | os.PathLike[str]) -> Dataset:
  """Reads a data set into memory and checks all of it.

  Raises:
    UserError: if there is no data set, it has fewer than two episodes, or a file is damaged, of a newer version of the
      format, or has wrong shapes, dtypes, actions or rewards; the message names the file.
  """
  path = workdir.locate(directory)
  spec, source = _read_info(path / _INFO)
  files = sorted(path.glob("*.npz"))
  if len(files) < 2:
    raise UserError(f"{path} holds {len(files)} episodes (.npz): training needs at least 2, of which one is held out")
  return Dataset(path, spec, tuple(_read_episode(file, spec) for file in files), source)


def _read_info(file: pathlib.Path) -> tuple[EnvSpec, str]:
  if not os.path.isfile(file):  # Unlike pathlib's, False for names that no file can have.
    raise UserError(f"{file.parent} holds no data set: there is no {_INFO}; docs/data.md describes the format")
  try:
    info = json.loads(file.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{file} cannot be read ({type(error).__name__}: {_first_line(error)})") from None
  if not isinstance(info, dict):
    raise UserError(f"{file} is not a JSON object")
  version: Any = info.get("version")
  actions: Any = info.get("num_actions")
  shape: Any = info.get("observation_shape")
  if not _is_size(version):
    raise UserError(f"{file} has version {version!r}: write {VERSION}")
  if version > VERSION:
    raise UserError(f"{file} has version {version}, and this jedi_jax reads version {VERSION}: install a newer one")
  if not _is_size(actions):
    raise UserError(f"{file} has num_actions {actions!r}: write an integer of at least 1")
  if not isinstance(shape, list) or len(shape) != 3 or not all(map(_is_size, shape)):
    raise UserError(f"{file} has observation_shape {shape!r}: write [height, width, channels]")
  source = info.get("source", "")
  return EnvSpec(actions, (shape[0], shape[1], shape[2])), source if isinstance(source, str) else ""


def _read_episode(file: pathlib.Path, spec: EnvSpec) -> Episode:
  try:
    with np.load(file, allow_pickle=False) as archive:
      if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("no archive of arrays")
      missing = [name for name in FIELDS if name not in archive]
      if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: write {', '.join(FIELDS)}")
      assert archive.zip is not None
      if sum(member.file_size for member in archive.zip.infolist()) > _MAX_BYTES:
        raise UserError(f"{file} unpacks to more than {_MAX_BYTES >> 30} GiB: write shorter episodes")
      arrays = {name: archive[name] for name in FIELDS}
      if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError("a member is no array")
  except UserError:
    raise
  except Exception as error:  # Damaged files fail in many ways, in zipfile, tokenize and NumPy.
    raise UserError(f"{file} is not a readable .npz file ({type(error).__name__}: {_first_line(error)})") from None
  for name in ("terminated", "truncated"):
    if arrays[name].dtype != bool or arrays[name].shape != ():
      raise UserError(f"{file} has {name} of {arrays[name].dtype} {arrays[name].shape}: write one bool")
  # An episode that was cut without a flag counts as truncated.
  fields = {name: arrays[name] for name in ("observations", "actions", "rewards")}
  episode = check_episode(str(file), {**fields, "ends": bool(arrays["terminated"])})
  _check_values(str(file), episode.observations, episode.actions, episode.rewards, spec)
  return episode._replace(actions=episode.actions.astype(np.int32), rewards=episode.rewards.astype(np.float32))


def _check_values(name: str, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray, spec: EnvSpec) -> None:
  if observations.shape[1:] != spec.observation_shape:
    raise UserError(f"{name} has frames of shape {observations.shape[1:]}, the data set of {spec.observation_shape}")
  if min(observations.shape) < 1:
    raise UserError(f"{name} has frames of shape {observations.shape[1:]}, without a pixel")
  low, high = int(actions.min()), int(actions.max())
  if low < 0 or high >= spec.num_actions:
    raise UserError(f"{name} has actions from {low} to {high}: they must be from 0 to {spec.num_actions - 1}")
  if np.abs(rewards).max() > np.finfo(np.float32).max:
    raise UserError(f"{name} has rewards beyond the range of float32")


def _is_size(value: Any) -> bool:
  return type(value) is int and value >= 1


def _first_line(error: BaseException) -> str:
  return (str(error).splitlines() or [""])[0][:120]


def from_run(directory: str | os.PathLike[str]) -> tuple[Workdir, list[Episode]]:
  """Reads the episodes in the replay of a run's newest checkpoint, oldest first.

  An episode whose first frames the ring has overwritten begins later. An unfinished one ends, truncated, at its last
  step whose next frame is stored.

  Args:
    directory: the run's working directory.

  Returns:
    The run and its episodes.

  Raises:
    UserError: if there is no such run, or it has no checkpoint with a replay.
  """
  run = workdir.read(directory)
  return run, list(replay_lib.to_episodes(load_replay(run)))


def load_replay(run: Workdir) -> replay_lib.ReplayState:
  """Reads the replay of the newest valid checkpoint of a run; NumPy arrays.

  Raises:
    UserError: if the run has no checkpoint, or none that is valid.
  """
  latest = run.checkpoints / "latest"
  if checkpoint.newest(latest) is None:
    raise UserError(f"{run.path} has no checkpoint, and so no replay")
  arrays = checkpoint.load_state(latest, "replay")
  where = f"the replay in {latest}"
  ring = np.shape(arrays.get("actions", 0))
  if len(ring) != 2 or min(ring) < 1:
    raise UserError(f"{where} is altered: it has no actions of streams")
  init = functools.partial(
    replay_lib.init, num_streams=ring[0], slots_per_stream=ring[1], observation_shape=run.spec.observation_shape
  )
  state: replay_lib.ReplayState = checkpoint.unflatten(arrays, jax.eval_shape(init), where=where)
  used = slice(max(int(state.num_episodes), 0))
  stream, start, steps = (np.asarray(x)[used] for x in (state.episode_stream, state.episode_start, state.episode_steps))
  within = (stream >= 0) & (stream < ring[0]) & (start >= 0) & (steps >= 0) & (steps <= ring[1])
  if not 0 <= int(state.num_episodes) <= len(state.episode_steps) or not within.all():
    raise UserError(f"{where} is altered: its table of episodes points outside of it")
  return state


def held_out(run: Workdir, directory: str | os.PathLike[str] | None = None) -> tuple[Episode, ...]:
  """Reads the held-out episodes of a run that was trained on data.

  Args:
    run: the run.
    directory: of its data set, if that has moved.

  Raises:
    UserError: if the run was not trained on data, or the data set is missing or has changed.
  """
  if run.data is None:
    raise UserError(f"{run.path} was not trained on recorded episodes: it has no --data")
  path = workdir.locate(run.data["directory"] if directory is None else directory)
  if not os.path.exists(path):
    raise UserError(f"{path}, the data of {run.path}, is missing: name its new place with --data")
  data = read(path)
  if data.record()["fingerprint"] != run.data["fingerprint"]:
    raise UserError(f"{path} is not the data that {run.path} was trained on: it has changed or is another data set")
  return data.held_out


_SET_BY_DATA = ("env.", "collect.")
_POLICY_UPDATES = ("training.first_updates.actor_critic", "training.updates.actor_critic")


def make_config(
  data: Dataset,
  *,
  variant: str = "jedi",
  preset: str = "paper",
  seed: int = 0,
  policy: bool = False,
  epochs: int | None = None,
  overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Config:
  """Builds the configuration of a run that trains on a data set, for `jedi_jax.train(config, directory, data=data)`.

  It differs from that of a run with an environment in these settings: the first epoch adds all episodes to replay,
  replay has room for all of them (`replay.capacity`), and segments are drawn from old and new episodes alike
  (`replay.age_weights`).

  Args:
    data: the data set.
    variant: see `config.make_config`.
    preset: see `config.make_config`.
    seed: see `config.make_config`.
    policy: whether the actor-critic trains too, in imagination.
    epochs: number of epochs; that of a run of the preset with an environment if None.
    overrides: see `config.make_config`; without settings of `env` and `collect`.

  Raises:
    UserError: as `config.make_config`, or if the data determine a setting of `overrides`.
  """
  if not isinstance(overrides, Mapping):
    overrides = dict(config_lib.split_override(text) for text in overrides)
  for path in overrides:
    if path.startswith(_SET_BY_DATA):
      raise UserError(f"{path} has no meaning without an environment: leave it out")
    if path in _POLICY_UPDATES and not policy:
      raise UserError(f"{path} is 0 unless the policy trains: add --policy (policy=True)")
  if epochs is not None and epochs < 1:
    raise UserError(f"epochs={epochs} is below 1: give at least 1")
  if epochs is not None and "training.final_epochs" in overrides:
    raise UserError("training.final_epochs is the number of epochs less one: leave out one of the two")
  names = {"env": RECORDED, "variant": variant, "preset": preset, "seed": seed}
  usual = config_lib.make_config(**names)  # type: ignore[arg-type]
  c = usual.collect
  if epochs is None:
    later = math.ceil((c.total_steps - c.first_epoch_min_steps) / c.steps_per_epoch)
    epochs = 1 + later + usual.training.final_epochs
  defaults: dict[str, Any] = {
    "replay.capacity": max(data.frames, _MIN_CAPACITY),
    "replay.final_frames": 0,  # The frames above include the final ones.
    "replay.age_weights": (1.0,),
    "training.final_epochs": epochs - 1,
  }
  steps = ("total_steps", "first_epoch_min_steps", "first_epoch_max_steps", "steps_per_epoch")
  forced: dict[str, Any] = {f"collect.{name}": data.steps for name in steps}
  forced |= {"collect.overlap": False, "env.num_envs": 1}
  if not policy:
    forced |= dict.fromkeys(_POLICY_UPDATES, 0)
  return config_lib.make_config(**names, overrides={**defaults, **overrides, **forced})  # type: ignore[arg-type]


def check_config(config: Config, data: Dataset) -> None:
  """Checks that a configuration is that of a run on a data set.

  Raises:
    UserError: if `make_config` did not build it for this data set.
  """
  if config.env.name != RECORDED or config.collect.first_epoch_min_steps != data.steps or config.env.num_envs != 1:
    raise UserError(f"the configuration is not made for {data.path}: use jedi_jax.datasets.make_config(data, ...)")
