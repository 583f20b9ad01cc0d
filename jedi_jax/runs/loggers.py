"""Loggers of a run beside metrics.jsonl: TensorBoard and Weights & Biases. The only importer of their packages."""

import contextlib
import os
import pathlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jedi_jax import config as config_lib
from jedi_jax.errors import UserError, nearest
from jedi_jax.runs import workdir
from jedi_jax.runs.workdir import Workdir


class Logger(Protocol):
  """Shows the metrics of a run. It raises `UserError` if it cannot write."""

  def write(self, epoch: int, values: Mapping[str, float]) -> None:
    """Writes the numbers of an epoch."""

  def write_image(self, epoch: int, name: str, image: np.ndarray) -> None:
    """Writes an image [H, W, 3] uint8; comes before `write` of its epoch."""

  def close(self) -> None:
    """Finishes pending writes; raises nothing."""


class TensorBoard:
  """Writes events for TensorBoard.

  Args:
    directory: of the events; created if missing.
    last_epoch: epoch after which the run resumes, 0 for a new run. TensorBoard drops later ones.
  """

  def __init__(self, directory: pathlib.Path, *, last_epoch: int):
    self._path, self._tensorboardx = directory, _import_tensorboardx()
    with workdir.write_errors("the events", self._path):
      directory.mkdir(parents=True, exist_ok=True)
      # SummaryWriter's thread ends at the first write error, and its full queue then blocks; EventsWriter has neither.
      self._events = self._tensorboardx.event_file_writer.EventsWriter(str(directory / "events"))
      log = self._tensorboardx.proto.event_pb2.SessionLog
      self._add(last_epoch + 1, session_log=log(status=log.START))  # TensorBoard drops this step and later ones.
      self._events.flush()

  def _add(self, epoch: int, **content: Any) -> None:
    event = self._tensorboardx.proto.event_pb2.Event(wall_time=time.time(), step=epoch, **content)
    self._events.write_event(event)

  def write(self, epoch: int, values: Mapping[str, float]) -> None:
    """See `Logger`."""
    with workdir.write_errors("the events", self._path):
      for name, value in values.items():
        self._add(epoch, summary=self._tensorboardx.summary.scalar(name, value))
      self._events.flush()

  def write_image(self, epoch: int, name: str, image: np.ndarray) -> None:
    """See `Logger`."""
    with workdir.write_errors("the events", self._path):
      self._add(epoch, summary=self._tensorboardx.summary.image(name, image, dataformats="HWC"))
      self._events.flush()

  def close(self) -> None:
    """See `Logger`."""
    with contextlib.suppress(OSError):
      self._events.close()


class WeightsAndBiases:
  """Writes a run of Weights & Biases. Its environment variables (WANDB_PROJECT, WANDB_MODE, ...) apply.

  The run's identifier is kept in the working directory, so that a resumed run goes on in the same one.

  Args:
    run: the run's working directory.
  """

  def __init__(self, run: Workdir):
    self._wandb = _import_wandb()
    try:
      self._run = self._wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "jedi_jax",
        id=_identifier(run.path / "wandb.json"),
        name=f"{run.config.env.name}, {run.config.variant}, seed {run.config.seed}",
        dir=str(run.path),
        config=config_lib.to_dict(run.config),
        resume="allow",
        reinit="create_new",  # Several runs share a program.
        settings=self._wandb.Settings(console="off"),
      )
    except Exception as error:  # W&B raises many types.
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      raise UserError(f"W&B cannot start ({reason}): log in with 'wandb login', or set WANDB_MODE=offline") from None

  def write(self, epoch: int, values: Mapping[str, float]) -> None:
    """See `Logger`. An epoch that a resumed run repeats has been written before."""
    if epoch >= self._run.step:
      self._log(dict(values), epoch, commit=True)

  def write_image(self, epoch: int, name: str, image: np.ndarray) -> None:
    """See `Logger`."""
    if epoch >= self._run.step:
      self._log({name: self._wandb.Image(image)}, epoch, commit=False)

  def _log(self, values: dict[str, Any], epoch: int, *, commit: bool) -> None:
    try:
      self._run.log(values, step=epoch, commit=commit)
    except Exception as error:  # W&B raises many types.
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      raise UserError(f"W&B cannot write ({reason}): repeat the command, without the logger wandb if need be") from None

  def close(self) -> None:
    """See `Logger`."""
    with contextlib.suppress(Exception):
      self._run.finish()


def _identifier(path: pathlib.Path) -> str:
  """Returns the identifier of the run in a file, which is written if missing."""
  if not path.exists():
    workdir.write_json(path, {"id": secrets.token_hex(4)})
  data = workdir.read_json(path)
  found = data.get("id") if isinstance(data, dict) else None
  if not isinstance(found, str) or not found.isalnum():
    raise UserError(f"{path} has no identifier of a run: remove it to start another run of W&B")
  return found


LOGGERS = ("tensorboard", "wandb")
"""Names of the loggers."""


def check(names: Sequence[str]) -> None:
  """Imports the packages of loggers.

  Raises:
    UserError: if a name is unknown or a package is missing.
  """
  for name in [names] if isinstance(names, str) else names:
    if name not in LOGGERS:
      raise UserError(f"unknown logger {name!r}{nearest(name, LOGGERS)}")
    _ = _import_wandb() if name == "wandb" else _import_tensorboardx()


def make(names: Sequence[str], run: Workdir, *, last_epoch: int) -> list[Logger]:
  """Opens loggers.

  Args:
    names: checked by `check`.
    run: the run's working directory.
    last_epoch: epoch after which the run resumes, 0 for a new run.

  Raises:
    UserError: if one cannot be opened.
  """
  found: list[Logger] = []
  try:
    for name in dict.fromkeys([names] if isinstance(names, str) else names):
      found.append(WeightsAndBiases(run) if name == "wandb" else TensorBoard(run.tensorboard, last_epoch=last_epoch))
  except UserError:
    for logger in found:
      logger.close()
    raise
  return found


def _import_tensorboardx() -> Any:
  try:
    import tensorboardX
    import tensorboardX.event_file_writer
    import tensorboardX.proto.event_pb2
    import tensorboardX.summary
  except ImportError:
    raise UserError("the logger tensorboard needs tensorboardX: pip install tensorboardX") from None
  return tensorboardX


def _import_wandb() -> Any:
  try:
    import wandb
  except ImportError:
    raise UserError("the logger wandb needs wandb: pip install wandb") from None
  return wandb
