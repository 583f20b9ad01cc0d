"""The directory of a run: what lies in it, and whose it is."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator
from typing import Any

from absl import logging

from jedi_jax import config as config_lib
from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.types import EnvSpec
from jedi_jax.version import __version__

_OURS = (
  "config.json",
  "metrics.jsonl",
  "result.json",
  "evaluation.json",
  "diagnosis.json",
  "checkpoints",
  "tensorboard",
)


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of a run, with the configuration and environment that it was started with."""

  path: pathlib.Path
  config: Config
  spec: EnvSpec

  @property
  def checkpoints(self) -> pathlib.Path:
    """Holds 'latest' (whole training states) and 'best' (parameters)."""
    return self.path / "checkpoints"

  @property
  def metrics(self) -> pathlib.Path:
    """JSON lines, one an epoch."""
    return self.path / "metrics.jsonl"

  @property
  def tensorboard(self) -> pathlib.Path:
    """TensorBoard's event files."""
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


def place(config: Config) -> pathlib.Path:
  """Where one of several runs lies in their common directory: <game>/seed_<n>."""
  return pathlib.Path(config.env.name.removeprefix("atari/").replace("/", "_")) / f"seed_{config.seed}"


def locate(directory: str | os.PathLike[str]) -> pathlib.Path:
  """The absolute path of a directory that a user named, ~ and ~user included.

  Raises:
    UserError: if there is no such user.
  """
  try:
    return pathlib.Path(directory).expanduser().absolute()
  except RuntimeError:
    raise UserError(f"{directory} begins with a user who is not known here: name another directory") from None


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[None]:
  """A context in which no other process trains in a directory.

  The lock is the kernel's, on the file `.lock` within, and ends with the process, however that ends; that the file is
  there says nothing. On a file system without locks there is a warning, and no protection.

  Args:
    directory: made if it does not exist.

  Raises:
    UserError: if another process has the lock, or there is none to be had.
  """
  path = _make(directory)
  with contextlib.ExitStack() as stack:
    try:
      # Not buffered: of a write that fails on a full disk nothing is left for closing to write.
      file = stack.enter_context((path / ".lock").open("ab+", buffering=0))
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      owner = file.read().decode(errors="replace").strip() or "another process"
      raise UserError(f"{path} is being trained by {owner}: wait for it, or take another --workdir") from None
    except OSError as error:
      if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        raise UserError(f"{path / '.lock'} cannot be locked ({error.strerror}): take another --workdir") from None
      logging.warning("%s cannot be locked (%s): see to it that one process alone trains there", path, error.strerror)
    else:
      with contextlib.suppress(OSError):  # A full disk; the lock holds all the same.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        stack.callback(file.truncate, 0)
    yield


def _make(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Makes a directory that can be written to."""
  path = locate(directory)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot make the directory {path}: {error.strerror}") from None
  if not os.access(path, os.W_OK):
    raise UserError(f"the directory {path} is not writable: take another --workdir")
  return path


def check(directory: str | os.PathLike[str], config: Config, spec: EnvSpec) -> Workdir | None:
  """Refuses a directory whose run is another one; nothing is made.

  Args:
    directory: which may be missing.
    config: the configuration that is asked for.
    spec: of its environment.

  Returns:
    The run that the directory holds, None where there is none.

  Raises:
    UserError: if the directory holds a run of another configuration.
  """
  path = locate(directory)
  if (path / "config.json").exists():
    old = read(path)
    different = config_lib.differences(old.config, config)
    if different:
      raise UserError(
        f"{path} holds a run of another configuration ({'; '.join(different)}): "
        "take another --workdir, or start anew with --overwrite"
      )
    if old.spec != spec:
      raise UserError(
        f"{path} holds a run of {config.env.name} with {old.spec}, but here it has {spec}: "
        "use the EnvPool version that it was started with, or start anew with --overwrite"
      )
    return old
  if (path / "checkpoints").exists():
    raise UserError(f"{path} has checkpoints but no config.json to tell whose: take another --workdir, or --overwrite")
  return None


def prepare(directory: str | os.PathLike[str], config: Config, spec: EnvSpec, *, overwrite: bool = False) -> Workdir:
  """Opens the directory of a new or interrupted run, which should be `locked` by who trains in it.

  Args:
    directory: made if it does not exist.
    config: the configuration that is asked for.
    spec: of its environment.
    overwrite: removes what an earlier run left here (and nothing else).

  Raises:
    UserError: if the directory cannot be made, or holds a run of another configuration.
  """
  path = _make(directory)
  if overwrite:
    for name in _OURS:
      target = path / name
      if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
      else:
        target.unlink(missing_ok=True)
  old = check(path, config, spec)
  if old is not None:
    return old
  write_json(
    path / "config.json",
    {
      "version": __version__,
      "spec": {"num_actions": spec.num_actions, "observation_shape": list(spec.observation_shape)},
      "config": config_lib.to_dict(config),
    },
  )
  return Workdir(path, config, spec)


def read(directory: str | os.PathLike[str]) -> Workdir:
  """Opens the directory of an existing run.

  Raises:
    UserError: if it holds no run, or its config.json cannot be read.
  """
  path = locate(directory)
  file = path / "config.json"
  try:
    data = json.loads(file.read_text())
    shape = data["spec"]["observation_shape"]
    spec = EnvSpec(int(data["spec"]["num_actions"]), (int(shape[0]), int(shape[1]), int(shape[2])))
    tree = data["config"]
    if not isinstance(tree, dict):
      raise TypeError(f"config is a {type(tree).__name__}")
  except FileNotFoundError:
    raise UserError(f"{path} holds no run: config.json is missing") from None
  except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
    reason = repr(error)[:200]
    raise UserError(f"{file} cannot be read ({reason}): restore it, or start anew with --overwrite") from None
  try:
    return Workdir(path, config_lib.from_dict(tree), spec)
  except UserError as error:
    version = data.get("version")
    raise UserError(
      f"{file} was written by version {version} and does not fit version {__version__}: {error}"
    ) from None


def read_json(path: pathlib.Path) -> Any:
  """Reads JSON.

  Raises:
    UserError: if the file cannot be read.
  """
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read ({error}): remove it to write it anew") from None


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the records of a metrics.jsonl, without a last line that was cut short.

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
  """Writes JSON atomically: the file is the old one or the new one, never a part; its directory is made if needed.

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
