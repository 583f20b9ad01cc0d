"""The working directory of a run: its paths, its lock and its JSON files."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from jedi_jax import config as config_lib
from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.types import EnvSpec
from jedi_jax.version import __version__

_RUN_FILES = (
  "config.json",
  "metrics.jsonl",
  "result.json",
  "evaluation.json",
  "diagnosis.json",
  "checkpoints",
  "tensorboard",
  "wandb.json",
  "wandb",
)


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of a run, with its configuration and environment.

  Attributes:
    path: the directory.
    config: the configuration that the run was started with.
    spec: the environment that the run was started with.
    data: of a run on recorded episodes, `datasets.Dataset.record` of them; None otherwise.
  """

  path: pathlib.Path
  config: Config
  spec: EnvSpec
  data: Mapping[str, Any] | None = None

  @property
  def checkpoints(self) -> pathlib.Path:
    """Directory of the checkpoints: 'latest' (training states) and 'best' (parameters)."""
    return self.path / "checkpoints"

  @property
  def metrics(self) -> pathlib.Path:
    """JSON lines, one per epoch."""
    return self.path / "metrics.jsonl"

  @property
  def tensorboard(self) -> pathlib.Path:
    """Directory of TensorBoard's event files."""
    return self.path / "tensorboard"

  @property
  def result(self) -> pathlib.Path:
    """JSON, written when the run ends."""
    return self.path / "result.json"

  @property
  def diagnosis(self) -> pathlib.Path:
    """JSON, written by the diagnosis."""
    return self.path / "diagnosis.json"

  @property
  def evaluation(self) -> pathlib.Path:
    """JSON, written by the evaluation program."""
    return self.path / "evaluation.json"


def relative_path(config: Config) -> pathlib.Path:
  """Returns the path of one of several runs in their common directory: <game>/seed_<n>."""
  return pathlib.Path(config.env.name.removeprefix("atari/").replace("/", "_")) / f"seed_{config.seed}"


def locate(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the absolute path of a directory; ~ and ~user are expanded.

  Raises:
    UserError: if the user does not exist.
  """
  try:
    return pathlib.Path(directory).expanduser().absolute()
  except RuntimeError:
    raise UserError(f"{directory} starts with an unknown user: name another directory") from None


class TakenError(UserError):
  """Another process trains in a directory."""


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[None]:
  """Keeps other processes from training in a directory.

  The kernel locks the file `.lock` until the process ends, in any way; the file itself may remain. File systems without
  locks cause a warning.

  Args:
    directory: created if missing.

  Raises:
    TakenError: if another process holds the lock.
    UserError: if the file cannot be locked.
  """
  path = _make_directory(directory)
  with contextlib.ExitStack() as stack:
    try:
      # Unbuffered: after a failed write to a full disk, closing has nothing left to write.
      file = stack.enter_context((path / ".lock").open("ab+", buffering=0))
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      owner = file.read().decode(errors="replace").strip() or "another process"
      raise TakenError(f"{path} is being trained by {owner}: wait for it, or take another --workdir") from None
    except OSError as error:
      if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        raise UserError(f"{path / '.lock'} cannot be locked ({error.strerror}): take another --workdir") from None
      logging.warning("%s cannot be locked (%s): do not train there with a second process", path, error.strerror)
    else:
      with contextlib.suppress(OSError):  # A full disk; the lock holds.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        stack.callback(file.truncate, 0)
    yield


def _make_directory(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Creates a writable directory and returns its absolute path."""
  path = locate(directory)
  if re.search(r"\\|\[.*\]", str(path)):
    raise UserError(f"{path} has [...] or a backslash: Orbax cannot read checkpoints there; take another --workdir")
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot make the directory {path}: {error.strerror}") from None
  if not os.access(path, os.W_OK):
    raise UserError(f"the directory {path} is not writable: take another --workdir")
  return path


def check(
  directory: str | os.PathLike[str], config: Config, spec: EnvSpec, data: Mapping[str, Any] | None = None
) -> Workdir | None:
  """Checks that a directory holds no run of another configuration; writes nothing.

  Args:
    directory: may be missing.
    config: configuration of the run to train.
    spec: environment of the run to train.
    data: of a run on recorded episodes, see `Workdir`.

  Returns:
    The run in the directory, or None if there is none.

  Raises:
    UserError: if the directory holds a run of another configuration.
  """
  path = locate(directory)
  refuse_saved_agent(path)
  if os.path.exists(path / "config.json"):  # Unlike pathlib's, False for names that no file can have.
    old = read(path)
    if data is not None and old.data is not None and data["fingerprint"] != old.data["fingerprint"]:
      raise UserError(
        f"{path} holds a run on other data ({old.data['directory']}, as it was then): "
        "take another --workdir, or restart with --overwrite"
      )
    different = config_lib.differences(old.config, config)
    if different:
      raise UserError(
        f"{path} holds a run of another configuration ({'; '.join(different)}): "
        "take another --workdir, or restart with --overwrite"
      )
    if old.spec != spec:
      raise UserError(
        f"{path} holds a run of {config.env.name} with {old.spec}, but here it has {spec}: "
        "use the version of the environment that it was started with, or restart with --overwrite"
      )
    return old
  if os.path.exists(path / "checkpoints"):
    raise UserError(f"{path} has checkpoints but no config.json: take another --workdir, or restart with --overwrite")
  return None


def refuse_saved_agent(directory: str | os.PathLike[str]) -> None:
  """Checks that a directory holds no saved agent.

  Raises:
    UserError: if it does.
  """
  path = locate(directory)
  if os.path.exists(path / "model.safetensors"):
    raise UserError(f"{path} holds a saved agent, which cannot be trained: take another --workdir")


def prepare(
  directory: str | os.PathLike[str],
  config: Config,
  spec: EnvSpec,
  *,
  data: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> Workdir:
  """Opens the directory of a new or interrupted run; the caller should hold its lock (see `locked`).

  Args:
    directory: created if missing.
    config: configuration of the run.
    spec: environment of the run.
    data: of a run on recorded episodes, see `Workdir`.
    overwrite: removes the files of an earlier run, and no other files.

  Raises:
    UserError: if the directory cannot be created, or holds a run of another configuration.
  """
  path = _make_directory(directory)
  refuse_saved_agent(path)
  if overwrite:
    for name in _RUN_FILES:
      target = path / name
      if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
      else:
        target.unlink(missing_ok=True)
  old = check(path, config, spec, data)
  if old is not None:
    return old
  write_json(
    path / "config.json",
    {
      "version": __version__,
      "spec": {"num_actions": spec.num_actions, "observation_shape": list(spec.observation_shape)},
      **({} if data is None else {"data": dict(data)}),
      "config": config_lib.to_dict(config),
    },
  )
  return Workdir(path, config, spec, data)


def read(directory: str | os.PathLike[str]) -> Workdir:
  """Opens the directory of an existing run.

  Raises:
    UserError: if it holds no run, or its config.json cannot be read.
  """
  path = locate(directory)
  about, config, spec = read_config(path, cure="restore it, or restart with --overwrite")
  return Workdir(path, config, spec, about.get("data"))


def read_config(path: pathlib.Path, *, cure: str) -> tuple[dict[str, Any], Config, EnvSpec]:
  """Reads the config.json of a run or of a saved agent: its contents, the configuration and the environment.

  Args:
    path: the directory.
    cure: what helps if the file cannot be read.

  Raises:
    UserError: if there is no such file, it cannot be read, or its configuration is not valid.
  """
  file = path / "config.json"
  try:
    data = json.loads(file.read_text())
    shape = data["spec"]["observation_shape"]
    spec = EnvSpec(int(data["spec"]["num_actions"]), (int(shape[0]), int(shape[1]), int(shape[2])))
    if min(spec.num_actions, *spec.observation_shape) < 1:
      raise ValueError(f"no environment has {spec}")
    tree = data["config"]
    if not isinstance(tree, dict):
      raise TypeError(f"config is a {type(tree).__name__}")
    recorded = data.get("data")
    if recorded is not None and not all(isinstance(recorded[name], str) for name in ("directory", "fingerprint")):
      raise TypeError("data are not those of a run")
  except FileNotFoundError:
    raise UserError(f"{path} holds no run and no saved agent: config.json is missing") from None
  except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
    reason = repr(error)[:200]
    raise UserError(f"{file} cannot be read ({reason}): {cure}") from None
  try:
    return data, config_lib.from_dict(tree), spec
  except UserError as error:
    version = " ".join(str(data.get("version")).split())[:40]
    written = "" if version == __version__ else f" was written by version {version} of jedi_jax, this is {__version__}:"
    raise UserError(f"{file}{written or ' is not valid here:'} {error}") from None


@contextlib.contextmanager
def write_errors(what: str, directory: pathlib.Path) -> Iterator[None]:
  """A context that turns errors of writing a run's files, `what` in a directory, into `UserError`."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f"cannot write {what} in {directory} ({error.strerror}): free the disk or make it writable, and "
      "repeat the command; the run resumes from its last checkpoint"
    ) from None


def read_json(path: pathlib.Path) -> Any:
  """Reads JSON.

  Raises:
    UserError: if the file cannot be read.
  """
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read ({error}): remove it to have it written again") from None


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the records of a metrics.jsonl; an incomplete last line is ignored.

  Raises:
    UserError: if the file cannot be read.
  """
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read ({error})") from None
  records = []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      if not isinstance(record, dict):
        raise ValueError
      records.append(record)
    except (ValueError, RecursionError):
      if number < len(lines):
        raise UserError(f"{path}, line {number}, is not JSON") from None
  return records


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON atomically, so that no reader sees a part of it; creates the directory if missing.

  Raises:
    UserError: if it cannot be written.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise UserError(f"cannot write {path}: {error.strerror}") from None
