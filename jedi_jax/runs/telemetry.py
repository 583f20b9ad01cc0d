"""What a run tells: JSON lines, and TensorBoard events (the only importer of tensorboardX)."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from jedi_jax.errors import UserError

Values = dict[str, float]


class MetricsWriter:
  """Writes one record an epoch to metrics.jsonl and to TensorBoard.

  A run that resumes after epoch n forgets the records after n: they will be written again.

  Args:
    jsonl: path of the JSON lines.
    tensorboard: directory of the events.
    last_epoch: the epoch that the run resumes after, 0 for a new run.

  Raises:
    UserError: if they cannot be written, here and by all methods but `close`.
  """

  def __init__(self, jsonl: pathlib.Path, tensorboard: pathlib.Path, *, last_epoch: int):
    self._path = jsonl
    with self._told():
      if jsonl.exists():
        lines = jsonl.read_text(errors="replace").splitlines()
        temporary = jsonl.with_name(f".{jsonl.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines if _epoch_of(line) <= last_epoch))
        temporary.replace(jsonl)
      self._file = jsonl.open("a")
      tensorboard.mkdir(parents=True, exist_ok=True)
      # Not SummaryWriter: its thread ends at the first failure to write, and the queue to it then blocks for ever.
      self._events = EventsWriter(str(tensorboard / "events"))
      started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._add(last_epoch + 1, session_log=started)  # TensorBoard forgets what it has of this step and later ones.
      self._events.flush()

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    """A context in which files that cannot be written are an error in one line."""
    try:
      yield
    except OSError as error:
      raise UserError(
        f"the run's records in {self._path.parent} cannot be written ({error.strerror}): mend that and run the same "
        "command again, it continues from the last checkpoint"
      ) from None

  def _add(self, epoch: int, **what: Any) -> None:
    self._events.write_event(event_pb2.Event(wall_time=time.time(), step=epoch, **what))

  def write(self, epoch: int, values: Mapping[str, Any]) -> None:
    """Writes a record; values that are numbers also go to TensorBoard, with the epoch as their step."""
    record = {"epoch": epoch} | {
      name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    with self._told():
      self._file.write(json.dumps(record) + "\n")
      self._file.flush()
      for name, value in values.items():
        if isinstance(value, int | float):
          self._add(epoch, summary=summary.scalar(name, value))
      self._events.flush()

  def write_image(self, epoch: int, name: str, image: np.ndarray) -> None:
    """Shows an image [H, W, 3] uint8 in TensorBoard."""
    with self._told():
      self._add(epoch, summary=summary.image(name, image, dataformats="HWC"))
      self._events.flush()

  def close(self) -> None:
    """Closes both; what could not be written has been told of."""
    for file in (self._file, self._events):
      with contextlib.suppress(OSError):
        file.close()


def _epoch_of(line: str) -> float:
  try:
    return float(json.loads(line)["epoch"])
  except (ValueError, KeyError, TypeError):
    return math.inf  # A line cut short by a kill.


def summarise(sums: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> Values:
  """Turns the sums of an epoch's metrics into named figures.

  Args:
    sums: by phase, each metric summed over updates; scalars or matrices.
    counts: updates by phase; phases without any are left out.

  Returns:
    'phase/metric' for scalars (their mean over updates that were not skipped), 'phase/skipped' (how many were),
    'phase/reward_recall_+1' and the like for confusion counts,
    'denoiser/latent_std' and 'denoiser/latent_rank' for the latents' Gram matrix.
  """
  values: Values = {}
  for phase, metrics in sums.items():
    skipped = float(metrics.get("skipped", 0.0))
    done = counts[phase] - skipped
    if counts[phase] and "skipped" in metrics:
      values[f"{phase}/skipped"] = skipped
    for name, value in metrics.items() if done else ():
      array = np.asarray(value, np.float64)
      if name == "skipped":
        continue
      if name.endswith("_confusion"):
        figures = precision_and_recall(name.removesuffix("_confusion"), array)
      elif name == "latent_gram":
        figures = latent_summary(array)
      else:
        figures = {name: float(array) / done}
      values |= {f"{phase}/{figure}": x for figure, x in figures.items()}
  return values


def precision_and_recall(name: str, counts: np.ndarray) -> Values:
  """Counts [K, K] of (label, prediction) to precision and recall of each class; absent where nothing was counted."""
  labels = ("-1", "0", "+1") if len(counts) == 3 else ("no", "yes")
  figures = {}
  for i, label in enumerate(labels):
    figures[f"{name}_count_{label}"] = float(counts[i].sum())
    if counts[i].sum() > 0:
      figures[f"{name}_recall_{label}"] = float(counts[i, i] / counts[i].sum())
    if counts[:, i].sum() > 0:
      figures[f"{name}_precision_{label}"] = float(counts[i, i] / counts[:, i].sum())
  return figures


def latent_summary(gram: np.ndarray) -> Values:
  """Standard deviation and effective rank of latents.

  Args:
    gram: [c + 1, c + 1], the sum of x x^T with x a latent position's channels after a leading 1.

  Returns:
    'latent_std': root of the mean variance of the channels; 'latent_rank': exponential of the entropy of the
    normalised eigenvalues of the channels' covariance (Roy and Vetterli 2007), from 1 to c.
  """
  if gram[0, 0] <= 0:
    return {}
  mean = gram[0, 1:] / gram[0, 0]
  covariance = gram[1:, 1:] / gram[0, 0] - np.outer(mean, mean)
  if not np.all(np.isfinite(covariance)):
    return {"latent_std": math.nan, "latent_rank": math.nan}
  shares = np.clip(np.linalg.eigvalsh(covariance), 0.0, None)
  total = shares.sum()
  if total <= 0:
    return {"latent_std": 0.0, "latent_rank": 0.0}
  shares = shares[shares > 0] / total
  return {
    "latent_std": float(np.sqrt(total / len(covariance))),
    "latent_rank": float(np.exp(-np.sum(shares * np.log(shares)))),
  }
