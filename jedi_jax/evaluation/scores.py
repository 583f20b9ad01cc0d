"""Scores of the Atari 100k benchmark: normalised, aggregated over runs and games, and beside the published ones.

Aggregates and their intervals are rliable's (Agarwal et al. 2021, arXiv:2108.13264), installed with
`pip install 'jedi_jax[report]'`. The published scores, with sources and conventions, are in published.json.
"""

import dataclasses
import functools
import importlib
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jedi_jax.errors import UserError, nearest
from jedi_jax.types import BEYOND

_ATARI = "atari/"
_FILE: Any = importlib.resources.files("jedi_jax.evaluation").joinpath("published.json")

METRICS = (
  "mean",
  "median",
  "iqm",
  "optimality_gap",
  "har_hns",
  "superhuman",
  "agent_optimal",
  "human_optimal",
  "asymmetry",
)
"""Aggregates of human-normalised scores (HNS).

mean, median, iqm, optimality_gap: as rliable defines them. har_hns: 1 / mean_i(1 / (HNS_i + 0.1)) over games i, with
HNS_i the mean over runs. superhuman: number of games with a mean HNS of at least 1. agent_optimal, human_optimal: mean
HNS of the 13 games where agents of 2020 to 2024 did well relative to humans, and of the 13 others. asymmetry:
agent_optimal - human_optimal.
"""

LOWER_IS_BETTER = ("optimality_gap", "asymmetry")


@dataclasses.dataclass(frozen=True)
class Scores:
  """Raw scores of one method.

  Attributes:
    name: name of the method.
    by_game: maps a game to the scores of its runs, or to a tuple of its one published mean.
    per_run: true for scores of runs, false for game means. They are never mixed, since the IQM of means differs from
      the IQM of runs.
    source: citation of the scores.
    note: caveats for readers.
    published: published aggregates by name, for comparison.
  """

  name: str
  by_game: Mapping[str, tuple[float, ...]]
  per_run: bool
  source: str = ""
  note: str = ""
  published: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A value and its 95% interval; the bounds are None where there are no runs to resample."""

  value: float
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class Aggregate:
  """Aggregated scores of a method.

  Attributes:
    metrics: maps names of `METRICS` to estimates; metrics that need missing games, or are not defined, are absent.
    games: games with scores, in the benchmark's order.
    missing: games of the benchmark without a score.
    runs: number of runs counted for every game; 1 for published means.
    left_out: maps a game to the number of its runs that are not counted, if any.
  """

  metrics: Mapping[str, Estimate]
  games: tuple[str, ...]
  missing: tuple[str, ...]
  runs: int
  left_out: Mapping[str, int]

  @property
  def complete(self) -> bool:
    """Whether every game of the benchmark has a score, all with the same number of runs."""
    return not self.missing and not self.left_out


def games() -> tuple[str, ...]:
  """Returns the names of the 26 games of Atari 100k, such as 'Breakout'."""
  return tuple(_published()["games"])


def human_normalized_score(env_name: str, score: float) -> float | None:
  """Computes (score - random) / (human - random): 0 for random play, 1 for human play.

  Args:
    env_name: name of the environment, such as 'atari/Breakout'.
    score: mean undiscounted return of whole games, from raw rewards.

  Returns:
    The normalised score; None for environments that are not one of the 26 games of Atari 100k.
  """
  game = env_name.removeprefix(_ATARI)
  if not env_name.startswith(_ATARI) or game not in _published()["games"]:
    return None
  return float(normalize(game, [score])[0])


def reference() -> dict[str, dict[str, float]]:
  """Returns the raw scores of 'random' and 'human' play by game."""
  return {kind: dict(_published()[kind]) for kind in ("random", "human")}


def normalize(game: str, scores: Sequence[float]) -> np.ndarray:
  """Converts raw scores of a game of `games()` to human-normalised scores [runs] float64."""
  table = _published()
  random, human = table["random"][game], table["human"][game]
  return (np.asarray(scores, np.float64) - random) / (human - random)


def published() -> dict[str, Scores]:
  """Returns the methods in `published.json` by name."""
  methods = {}
  for name, entry in _published()["methods"].items():
    aggregates = entry.get("published") or entry.get("aggregates_reported") or {}
    per_run = entry.get("per_run")
    means = {game: (value,) for game, value in (entry["scores"] or {}).items() if value is not None}
    methods[name] = Scores(
      name=name,
      by_game={game: tuple(values) for game, values in per_run.items()} if per_run else means,
      per_run=bool(per_run),
      source=entry.get("per_run_source") or entry["source"],
      note=entry.get("note", ""),
      published=aggregates,
    )
  return methods


def find_published(names: Sequence[str]) -> list[Scores]:
  """Returns the published methods with these names.

  Raises:
    UserError: if a name is unknown.
  """
  known = published()
  for name in names:
    if name not in known:
      raise UserError(f"unknown method {name!r}{nearest(name, known)}")
  return [known[name] for name in names]


def matrix(scores: Scores) -> tuple[np.ndarray, Aggregate]:
  """Arranges normalised scores as the matrix that rliable takes.

  Args:
    scores: raw scores; games outside the benchmark are ignored.

  Returns:
    HNS [runs, games] float64, and an `Aggregate` without metrics that describes its rows and columns. If games have
    unequal numbers of runs, only the first runs of each count, as many as every game has.

  Raises:
    UserError: if no game of the benchmark has a score, or a score is not finite.
  """
  present = tuple(game for game in games() if scores.by_game.get(game))
  if not present:
    raise UserError(f"{scores.name} has no score of any game of Atari 100k")
  runs = min(len(scores.by_game[game]) for game in present)
  left_out = {game: len(scores.by_game[game]) - runs for game in present if len(scores.by_game[game]) > runs}
  hns = np.stack([normalize(game, scores.by_game[game][:runs]) for game in present], axis=1)
  if not np.all(np.isfinite(hns)):
    raise UserError(f"{scores.name} has a score that is not a finite number")
  missing = tuple(game for game in games() if game not in present)
  return hns, Aggregate({}, present, missing, runs, left_out)


def aggregate(scores: Scores, *, reps: int = 2_000, seed: int = 0) -> Aggregate:
  """Computes all aggregates of a method, with 95% intervals by stratified bootstrap.

  Args:
    scores: raw scores of the method.
    reps: number of bootstrap replications; 0 for no intervals.
    seed: seed of the bootstrap.

  Raises:
    UserError: as `matrix`, or if rliable is not installed.
  """
  hns, about = matrix(scores)
  names = [name for name in METRICS if _needs(name) <= set(about.games)]

  def figures(x: np.ndarray) -> np.ndarray:
    return np.asarray([_metric(name, x, about.games) for name in names])

  values = figures(hns)
  low: Sequence[float | None] = [None] * len(names)
  high: Sequence[float | None] = [None] * len(names)
  if scores.per_run and about.runs > 1 and reps:
    library = _rliable("library")
    # rliable 1.2 ignores `random_state` and draws from NumPy's global generator.
    before = np.random.get_state()
    np.random.seed(seed)
    try:
      _, intervals = library.get_interval_estimates({scores.name: hns}, figures, reps=reps)
    finally:
      np.random.set_state(before)
    # Har-HNS is undefined where a resampled game is far below random play; then it has no interval.
    low, high = ([x if math.isfinite(x) else None for x in row.tolist()] for row in intervals[scores.name])
  rows = zip(names, values, low, high, strict=True)
  metrics = {name: Estimate(float(value), *bounds) for name, value, *bounds in rows if math.isfinite(value)}
  return dataclasses.replace(about, metrics=metrics)


def probability_of_improvement(x: Scores, y: Scores) -> tuple[float, tuple[str, ...]]:
  """Computes the probability that a run of `x` scores higher than a run of `y`, averaged over the games of both.

  Returns:
    The probability, and the games that both have.

  Raises:
    UserError: if `x` or `y` has game means only, or they share no game.
  """
  for scores in (x, y):
    if not scores.per_run:
      raise UserError(f"{scores.name} has game means only: a probability of improvement needs runs")
  shared = tuple(game for game in games() if x.by_game.get(game) and y.by_game.get(game))
  if not shared:
    raise UserError(f"{x.name} and {y.name} share no game")
  metrics = _rliable("metrics")
  each = [
    metrics.probability_of_improvement(
      normalize(game, x.by_game[game])[:, None], normalize(game, y.by_game[game])[:, None]
    )
    for game in shared
  ]
  return float(np.mean(each)), shared


def performance_profile(scores: Scores, thresholds: Sequence[float]) -> np.ndarray:
  """Computes the share of runs over all games with an HNS above each threshold: [len(thresholds)] float64."""
  hns, _ = matrix(scores)
  return np.mean(hns[None] > np.asarray(thresholds, np.float64)[:, None, None], axis=(1, 2))


def partition() -> dict[str, tuple[str, ...]]:
  """Returns the games by group: 'agent_optimal' and 'human_optimal', 13 each."""
  table = _published()["partition"]
  return {name: tuple(table[name]) for name in ("agent_optimal", "human_optimal")}


def _needs(metric: str) -> set[str]:
  """Returns the games that a metric requires."""
  groups = partition()
  if metric == "asymmetry":
    return set(games())
  return set(groups.get(metric, ()))


def _metric(name: str, hns: np.ndarray, present: Sequence[str]) -> float:
  if name in ("mean", "median", "iqm", "optimality_gap"):
    return float(getattr(_rliable("metrics"), f"aggregate_{name}")(hns))
  means = hns.mean(axis=0)
  if name == "har_hns":
    return float(1.0 / np.mean(1.0 / (means + 0.1))) if np.all(means > -0.1) else math.nan
  if name == "superhuman":
    return float(np.sum(means >= 1.0 - 1e-9))
  by_game = dict(zip(present, means, strict=True))

  def mean_of(group: str) -> float:
    return float(np.mean([by_game[game] for game in partition()[group]]))

  return mean_of("agent_optimal") - mean_of("human_optimal") if name == "asymmetry" else mean_of(name)


def _rliable(module: str) -> Any:
  try:
    return importlib.import_module(f"rliable.{module}")
  except ImportError:
    raise UserError("aggregates need rliable: pip install 'jedi_jax[report]'") from None


@functools.cache
def _published() -> dict[str, Any]:
  """Reads published.json: `games`, their `random` and `human` scores, the `partition`, `methods` and their sources.

  Raises:
    UserError: if the file is damaged.
  """
  try:
    table = json.loads(_FILE.read_text(encoding="utf-8"))
    _check(table)
  except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    reason = (str(error).splitlines() or [""])[0][:200]
    raise UserError(f"{_FILE} is damaged ({type(error).__name__}: {reason}): reinstall jedi_jax") from None
  return table


def _check(table: Any) -> None:
  """Raises ValueError, TypeError, KeyError or AttributeError if the published scores are incomplete or malformed."""

  def numbers(values: Any) -> None:
    if not all(type(value) in (int, float) and abs(value) < BEYOND for value in values):
      raise ValueError("a score is not a number")

  def known(names: Any) -> None:
    unknown = [name for name in names if name not in table["games"]]
    if unknown:
      raise ValueError(f"{unknown[0]!r} is not one of its games")

  if len(set(table["games"])) != len(table["games"]) or not table["games"]:
    raise ValueError("its games are not all different")
  for kind in ("random", "human"):
    numbers(table[kind][game] for game in table["games"])
  for game in table["games"]:
    if table["random"][game] == table["human"][game]:
      raise ValueError(f"random and human play of {game} are the same")
  for group in ("agent_optimal", "human_optimal"):
    known(table["partition"][group])
  for name, entry in table["methods"].items():
    if not all(isinstance(text, str) for text in (name, entry["source"], entry.get("note", ""))):
      raise TypeError("a name, source or note is not a text")
    known(entry["scores"] or {})
    known(entry.get("per_run") or {})
    numbers(value for value in (entry["scores"] or {}).values() if value is not None)
    for values in (entry.get("per_run") or {}).values():
      numbers(values)
    for kind in ("published", "aggregates_reported"):
      numbers((entry.get(kind) or {}).values())
