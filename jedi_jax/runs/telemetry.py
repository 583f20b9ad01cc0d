"""Metrics of a run: sums of updates into figures, and the records of metrics.jsonl."""

import contextlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jedi_jax.runs import workdir
from jedi_jax.runs.loggers import Logger

Values = dict[str, float]

MIN_EXAMPLES = 5
"""Classes with fewer examples do not enter the F1 score."""


class MetricsWriter:
  """Writes one record per epoch to metrics.jsonl, and its numbers to loggers.

  Records after `last_epoch` are removed: a resumed run writes them again.

  Args:
    jsonl: path of metrics.jsonl.
    loggers: further writers, which are closed with this one.
    last_epoch: epoch after which the run resumes, 0 for a new run.

  Raises:
    UserError: if the files cannot be written, here and in every method except `close`.
  """

  def __init__(self, jsonl: pathlib.Path, loggers: Sequence[Logger] = (), *, last_epoch: int):
    self._path, self._loggers = jsonl, loggers
    with workdir.write_errors("the metrics", self._path.parent):
      if jsonl.exists():
        lines = jsonl.read_text(errors="replace").splitlines()
        temporary = jsonl.with_name(f".{jsonl.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines if _epoch_of(line) <= last_epoch))
        temporary.replace(jsonl)
      self._file = jsonl.open("a")

  def write(self, epoch: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a record and returns it, with None for NaN and infinity; numbers also go to the loggers."""
    record = {"epoch": epoch} | {
      name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    with workdir.write_errors("the metrics", self._path.parent):
      self._file.write(json.dumps(record) + "\n")
      self._file.flush()
    for logger in self._loggers:
      logger.write(epoch, {name: value for name, value in values.items() if isinstance(value, int | float)})
    return record

  def write_image(self, epoch: int, name: str, image: np.ndarray) -> None:
    """Gives an image [H, W, 3] uint8 to the loggers, before the record of its epoch."""
    for logger in self._loggers:
      logger.write_image(epoch, name, image)

  def close(self) -> None:
    """Closes the files; errors are ignored, since the methods that write have raised them."""
    with contextlib.suppress(OSError):
      self._file.close()
    for logger in self._loggers:
      logger.close()


def _epoch_of(line: str) -> float:
  """Returns the epoch of a record, infinity for a line that is no record."""
  try:
    return float(json.loads(line)["epoch"])
  except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
    return math.inf  # A killed process leaves incomplete lines.


def summarise(sums: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> Values:
  """Computes an epoch's metrics from their sums over updates; docs/metrics.md lists them.

  Args:
    sums: by phase and metric, the sum over updates; a scalar, a confusion matrix, or what
      `ops.statistics.latent_statistics` returns.
    counts: updates by phase; phases without updates are omitted.

  Returns:
    'phase/metric' for scalars, the mean over updates that were not skipped; 'phase/skipped', the number of skipped
    updates; `precision_and_recall` of confusion matrices; `latent_summary` of the moments of latents; 'latent_change',
    the root of the mean of 'latent_change_square'; 'encoder_movement' as it is, since a call of the epoch has one.
  """
  values: Values = {}
  for phase, metrics in sums.items():
    skipped = float(metrics.get("skipped", 0.0))
    done = counts[phase] - skipped
    if counts[phase] and "skipped" in metrics:
      values[f"{phase}/skipped"] = skipped
    for name, value in metrics.items() if done else ():
      array = np.asarray(value, np.float64)
      if name in ("skipped", "latent_moments", "feature_moments"):
        continue
      if name.endswith("_confusion"):
        figures = precision_and_recall(name.removesuffix("_confusion"), array)
      elif name == "latent_gram":
        figures = latent_summary(array, np.asarray(metrics["latent_moments"], np.float64))
      elif name == "latent_change_square":
        figures = {"latent_change": math.sqrt(array / done)}
      elif name == "encoder_movement":
        figures = {name: float(array)}
      else:
        figures = {name: float(array) / done}
      values |= {f"{phase}/{figure}": x for figure, x in figures.items()}
  return values


def precision_and_recall(name: str, counts: np.ndarray) -> Values:
  """Computes precision and recall of each class.

  Args:
    name: prefix of the names, such as 'reward'.
    counts: [K, K] examples by (label, prediction). Three classes are the signs -1, 0, +1; two are 'no', 'yes'.

  Returns:
    'name_count_class', 'name_recall_class' (absent without examples of the class) and 'name_precision_class' (absent
    if the class was never predicted).
  """
  labels = ("-1", "0", "+1") if len(counts) == 3 else ("no", "yes")
  figures = {}
  for i, label in enumerate(labels):
    figures[f"{name}_count_{label}"] = float(counts[i].sum())
    if counts[i].sum() > 0:
      figures[f"{name}_recall_{label}"] = float(counts[i, i] / counts[i].sum())
    if counts[:, i].sum() > 0:
      figures[f"{name}_precision_{label}"] = float(counts[i, i] / counts[:, i].sum())
  return figures


def f1(rewards: np.ndarray, ends: np.ndarray) -> float | None:
  """Computes the mean F1 score of negative rewards, positive rewards and ends.

  Args:
    rewards: [3, 3] examples by (label, prediction), of the signs -1, 0, +1.
    ends: [2, 2] examples by (label, prediction).

  Returns:
    The mean over the classes with at least `MIN_EXAMPLES` examples; None if there is no such class.
  """
  scores = []
  for counts, label in ((rewards, 0), (rewards, 2), (ends, 1)):
    if counts[label].sum() >= MIN_EXAMPLES:
      scores.append(2 * counts[label, label] / (counts[label].sum() + counts[:, label].sum()))
  return float(np.mean(scores)) if scores else None


def world_model_summary(figures: Mapping[str, np.ndarray]) -> Values:
  """Computes the metrics of the world model from the figures of `dreams.make_watch`; docs/metrics.md lists them."""
  values: Values = {}
  for source in ("real", "imagined"):
    score = f1(figures[f"reward_{source}"], figures[f"end_{source}"])
    if score is not None:
      values[f"world_model/f1_{source}"] = score
  over_copying = figures["error"] / np.maximum(figures["copying"], 1e-8)
  return values | {
    "world_model/error_1": float(over_copying[0]),
    "world_model/error_last": float(over_copying[-1]),
    "world_model/calibration": float(figures["calibration"]),
  }


def latent_summary(gram: np.ndarray, moments: np.ndarray) -> Values:
  """Computes the deviations and the effective rank of latents.

  Args:
    gram: [c + 1, c + 1], sum over latent positions of x x^T, where x is 1 followed by the c channels.
    moments: [2, h, w, c], sums over the same frames of the latent and of its square.

  Returns:
    'latent_std', the root of the channels' mean variance over positions and frames; 'latent_rank', the exponential of
    the entropy of the normalised eigenvalues of the channels' covariance (Roy and Vetterli 2007), in [1, c]; and
    'latent_deviation', the root of the mean over positions and channels of the variance over frames. A constant picture
    has a positive standard deviation and the deviation 0. All are 0 if all latents are equal, NaN if the Gram matrix is
    not finite, absent without positions.
  """
  if gram[0, 0] <= 0:
    return {}
  mean = gram[0, 1:] / gram[0, 0]
  covariance = gram[1:, 1:] / gram[0, 0] - np.outer(mean, mean)
  if not np.all(np.isfinite(covariance)):
    return {"latent_std": math.nan, "latent_rank": math.nan, "latent_deviation": math.nan}
  first, second = moments / (gram[0, 0] / math.prod(moments.shape[1:3]))
  deviation = float(np.sqrt(np.mean(np.clip(second - first**2, 0.0, None))))
  shares = np.clip(np.linalg.eigvalsh(covariance), 0.0, None)
  total = shares.sum()
  if total <= 0:
    return {"latent_std": 0.0, "latent_rank": 0.0, "latent_deviation": deviation}
  shares = shares[shares > 0] / total
  return {
    "latent_std": float(np.sqrt(total / len(covariance))),
    "latent_rank": float(np.exp(-np.sum(shares * np.log(shares)))),
    "latent_deviation": deviation,
  }
