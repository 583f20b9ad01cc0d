"""Results of MinAtar games beside the published scores, which are in minatar.json with their sources."""

import csv
import dataclasses
import functools
import importlib.resources
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jedi_jax.evaluation.report import Run, is_minatar

PROTOCOLS = (
  "gymnax: no sticky actions, minimal action sets, at most 1,000 steps a game (2,500 in Freeway).",
  "sticky: a step repeats the previous action with probability 0.1. Our games with sticky actions keep the action sets "
  "and time limits of gymnax.",
)
"""What the names of protocols mean. Rows of different protocols are not comparable."""


@dataclasses.dataclass(frozen=True)
class Row:
  """The score of one method on one game.

  Attributes:
    game: such as 'Breakout'.
    method: the variant and preset of our runs, or the published method.
    protocol: 'gymnax', or 'sticky' for sticky actions with probability 0.1; other probabilities are named.
    steps: environment steps of training; None for random play.
    mean: mean return; of our methods over the runs' means.
    low: lower bound of the 95% interval over runs; None for a single run and for published scores.
    high: its upper bound.
    runs: number of runs; None for published scores.
    seconds: mean seconds of a run; None where a run does not have them.
    source: citation; empty for our runs.
  """

  game: str
  method: str
  protocol: str
  steps: int | None
  mean: float
  low: float | None = None
  high: float | None = None
  runs: int | None = None
  seconds: float | None = None
  source: str = ""


def compare(runs: Sequence[Run], *, reps: int = 2_000, seed: int = 0) -> list[Row]:
  """Averages our runs of each game and appends the published scores of the game.

  Args:
    runs: results; those of other environments are ignored.
    reps: replications of the bootstrap over runs, whose percentiles are the interval; 0 for no intervals.
    seed: seed of the bootstrap.

  Returns:
    Rows by game; our methods precede the published ones.
  """
  grouped: dict[str, dict[tuple[str, str, int], list[Run]]] = {}
  for run in filter(is_minatar, runs):
    game, protocol = _split(run.game)
    grouped.setdefault(game, {}).setdefault((protocol, run.method, run.env_steps), []).append(run)
  rows = []
  for game, ours in sorted(grouped.items()):
    for (protocol, method, steps), some in sorted(ours.items()):
      scores = np.array([run.score for run in some])
      low, high = _interval(scores, reps, seed)
      times = [run.seconds for run in some if run.seconds is not None]
      seconds = float(np.mean(times)) if len(times) == len(some) else None
      rows.append(Row(game, method, protocol, steps, float(scores.mean()), low, high, len(some), seconds))
    rows += [
      Row(game, row["agent"], row["protocol"], row["steps"], row[game], source=row["source"])
      for row in _published()["scores"]
      if game in row
    ]
  return rows


def notes(runs: Sequence[Run]) -> list[str]:
  """Returns one sentence for each game whose evaluation had a lower time limit than gymnax's."""
  found = sorted({(*_split(run.game), run.max_episode_steps) for run in filter(is_minatar, runs)})
  limits = _published()["episode_steps"]
  return [
    f"{game} ({protocol}): the games of the evaluation were cut after {steps} steps instead of {limits[game]}."
    for game, protocol, steps in found
    if steps < limits.get(game, 0)
  ]


def tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
  """Returns a table for each game: a header and one row per method."""
  header = ["method", "protocol", "steps", "mean return", "95% interval", "runs", "seconds a run", "source"]
  result: dict[str, list[list[str]]] = {}
  for row in rows:
    interval = "-" if row.low is None or row.high is None else f"[{row.low:.2f}, {row.high:.2f}]"
    cells = [row.method, row.protocol, _number(row.steps), f"{row.mean:.2f}" if row.runs else f"{row.mean:g}", interval]
    result.setdefault(row.game, [header]).append(
      [*cells, _number(row.runs), _number(row.seconds), row.source or "these runs"]
    )
  return result


def to_csv(rows: Sequence[Row]) -> str:
  """Returns all rows as CSV; the columns are the attributes of `Row`, empty where None."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow([field.name for field in dataclasses.fields(Row)])
  writer.writerows(dataclasses.astuple(row) for row in rows)
  return text.getvalue()


def _split(name: str) -> tuple[str, str]:
  """Splits the name of an environment into game and protocol."""
  game, _, query = name.removeprefix("minatar/").partition("?")
  probability = query.removeprefix("sticky=") or "0"
  return game, {"0": "gymnax", "0.1": "sticky"}.get(probability, f"sticky {probability}")


def _interval(scores: np.ndarray, reps: int, seed: int) -> tuple[float, float] | tuple[None, None]:
  if len(scores) < 2 or not reps:
    return None, None
  drawn = np.random.default_rng(seed).choice(scores, size=(reps, len(scores)))
  low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
  return float(low), float(high)


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:,.0f}"


@functools.cache
def _published() -> dict[str, Any]:
  text = importlib.resources.files("jedi_jax.evaluation").joinpath("minatar.json").read_text(encoding="utf-8")
  table: dict[str, Any] = json.loads(text)
  return table
