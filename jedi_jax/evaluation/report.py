"""Tables and figures of the Atari 100k benchmark from result.json files; curves of all environments."""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jedi_jax.errors import UserError
from jedi_jax.evaluation import scores as scores_lib
from jedi_jax.evaluation.scores import METRICS, Aggregate, Estimate, Scores
from jedi_jax.runs import figures, workdir

PROTOCOL = {"env_steps": 100_000, "games": 100, "max_episode_steps": 27_000}
"""Values that every result of the benchmark must have; `collect` notes deviations."""

LABELS = {
  "mean": "Mean",
  "median": "Median",
  "iqm": "IQM",
  "optimality_gap": "Optimality gap",
  "har_hns": "Har-HNS",
  "superhuman": "Superhuman games",
  "agent_optimal": "Agent-Optimal mean",
  "human_optimal": "Human-Optimal mean",
  "asymmetry": "Asymmetry",
}


_LONGEST_NAME = 200


@dataclasses.dataclass(frozen=True)
class Run:
  """The contents of one result.json.

  Attributes:
    path: path of the file.
    method: the variant, followed by the preset if that is not `paper`.
    game: name of the environment without 'atari/', such as 'Breakout'.
    seed: seed of the run.
    score: mean return of the final evaluation.
    env_steps: environment steps of training.
    games: number of games of the final evaluation.
    max_episode_steps: time limit of these games in environment steps.
    seconds: duration of the run; None if the file does not have it.
    curve: (environment steps, frames, mean return) of each evaluation during training, from metrics.jsonl.
  """

  path: pathlib.Path
  method: str
  game: str
  seed: int
  score: float
  env_steps: int
  games: int
  max_episode_steps: int
  seconds: float | None
  curve: tuple[tuple[int, int, float], ...]


def is_minatar(run: Run) -> bool:
  """Returns whether a run is of a MinAtar game; `jedi_jax.evaluation.minatar` reports these."""
  return run.game.startswith("minatar/")


def read_runs(paths: Iterable[pathlib.Path]) -> tuple[list[Run], list[str]]:
  """Reads result.json files, and metrics.jsonl in the same directories where it exists.

  Returns:
    The runs; and notes, at most one sentence, on the results that have no games and are skipped.

  Raises:
    UserError: if a file cannot be read or has invalid contents.
  """
  results = {path: workdir.read_json(path) for path in paths}
  recorded = [path for path, result in results.items() if _is_offline(result)]
  runs = [_read_run(path, result) for path, result in results.items() if path not in recorded]
  if not recorded:
    return runs, []
  return runs, [
    f"Skipped, since training on recorded episodes plays no games (evaluate.py --env=... does): "
    f"{', '.join(map(str, recorded))}."
  ]


def _is_offline(result: Any) -> bool:
  """Returns whether the contents of a result.json are those of a run on recorded episodes, without an evaluation."""
  return isinstance(result, dict) and isinstance(result.get("data"), dict) and "mean_return" not in result


def _read_run(path: pathlib.Path, result: Any) -> Run:
  try:
    env, variant, preset = (str(result[name]) for name in ("env", "variant", "preset"))
    score = float(result["mean_return"])
    run = Run(
      path=path,
      method=variant if preset == "paper" else f"{variant} ({preset})",
      game=_game(env),
      seed=int(result["seed"]),
      score=score,
      env_steps=int(result["env_steps"]),
      games=len(result["episode_returns"]),
      max_episode_steps=int(result["max_episode_steps"]),
      seconds=float(result["seconds"]) if "seconds" in result else None,
      curve=(),
    )
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    reason = (str(error).splitlines() or [""])[0][:200]
    raise UserError(f"{path} is not the result of a run ({type(error).__name__}: {reason})") from None
  if not abs(score) < scores_lib.BEYOND:
    raise UserError(f"{path} has a mean return of {score}")
  for name in ("seed", "env_steps", "max_episode_steps"):
    if not 0 <= getattr(run, name) < scores_lib.BEYOND:
      raise UserError(f"{path} has a value of {name} that no run has")
  if run.seconds is not None and not 0 <= run.seconds < scores_lib.BEYOND:
    raise UserError(f"{path} has a duration of {run.seconds} seconds")
  for name in (env, variant, preset):
    if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
      raise UserError(f"{path} has the invalid name {name[:_LONGEST_NAME]!r}")
  return dataclasses.replace(run, curve=_curve(path.with_name("metrics.jsonl")))


def _game(env: str) -> str:
  """Returns the name of a game in reports: one for each environment, though sticky=0.10 is sticky=0.1, and 0 none."""
  game, sticky, probability = env.removeprefix("atari/").partition("?sticky=")
  probability = probability.rstrip("0").rstrip(".") if "." in probability else probability
  return game + (sticky + probability if probability != "0" else "")


def _curve(path: pathlib.Path) -> tuple[tuple[int, int, float], ...]:
  if not path.exists():
    return ()
  records = workdir.read_metrics(path)
  try:
    records = [record for record in records if "evaluation/return" in record]
    points = tuple((int(r["env_steps"]), int(r["frames"]), float(r["evaluation/return"])) for r in records)
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    reason = (str(error).splitlines() or [""])[0][:200]
    raise UserError(f"{path} is not the metrics of a run ({type(error).__name__}: {reason})") from None
  if not all(abs(x) < scores_lib.BEYOND for point in points for x in point):
    raise UserError(f"{path} has an evaluation that is not a finite number")
  return points


def collect(runs: Sequence[Run]) -> tuple[dict[str, Scores], list[str]]:
  """Groups runs by method.

  Returns:
    The methods by name, with runs ordered by seed; and notes, one sentence each, on runs of environments that no
    report is about and on deviations from `PROTOCOL`.

  Raises:
    UserError: if two runs have the same method, game and seed, and in MinAtar number of steps.
  """
  known = set(scores_lib.games())
  seen: dict[tuple[str, str, int, int], pathlib.Path] = {}
  grouped: dict[str, dict[str, list[Run]]] = {}
  notes = []
  for run in sorted(runs, key=lambda run: (run.method, run.game, run.seed)):
    key = (run.method, run.game, run.seed, run.env_steps if is_minatar(run) else 0)
    if key in seen:
      raise UserError(f"{seen[key]} and {run.path} are both {run.method} on {run.game} with seed {run.seed}: drop one")
    seen[key] = run.path
    if run.game in known:
      grouped.setdefault(run.method, {}).setdefault(run.game, []).append(run)
    elif not is_minatar(run):
      notes.append(f"{run.method}: {run.game}, seed {run.seed}, is not a game of Atari 100k and does not count.")
  for name, wanted in PROTOCOL.items():
    others = sorted({getattr(run, name) for run in runs if run.game in known} - {wanted})
    if others:
      notes.append(f"Not the benchmark's protocol: {name} is {', '.join(map(str, others))} instead of {wanted}.")
  methods = {
    method: Scores(method, {game: tuple(run.score for run in some) for game, some in by_game.items()}, per_run=True)
    for method, by_game in grouped.items()
  }
  return methods, notes


def describe_gaps(name: str, aggregate: Aggregate) -> list[str]:
  """Returns notes on the games and runs that an aggregate does not include."""
  notes = []
  if aggregate.missing:
    notes.append(
      f"{name}: {len(aggregate.games)} of 26 games; missing: {', '.join(aggregate.missing)}. "
      "Its aggregates are over these games only and are not comparable with others."
    )
  if aggregate.left_out:
    extra = ", ".join(f"{game} {count}" for game, count in aggregate.left_out.items())
    notes.append(
      f"{name}: games have unequal numbers of runs; the first {aggregate.runs} of each count, left out: {extra}."
    )
  return notes


def aggregate_table(methods: Mapping[str, Scores], aggregates: Mapping[str, Aggregate]) -> list[list[str]]:
  """Returns a header and one row per method: number of games, number of runs, and `METRICS`."""
  rows = [["method", "games", "runs", *(LABELS[metric] for metric in METRICS)]]
  for name, aggregate in aggregates.items():
    cells = [_cell(aggregate.metrics.get(metric)) for metric in METRICS]
    runs = str(aggregate.runs) if methods[name].per_run else "means"
    rows.append([name, str(len(aggregate.games)), runs, *cells])
  return rows


def game_table(methods: Mapping[str, Scores]) -> list[list[str]]:
  """Returns a header and one row per game: mean raw scores of random and human play and of each method."""
  rows = [["game", "random", "human", *methods]]
  reference = scores_lib.reference()
  for game in scores_lib.games():
    cells = []
    for method in methods.values():
      values = method.by_game.get(game)
      cells.append(f"{np.mean(values):.1f}" if values else "-")
    rows.append([game, *(f"{reference[kind][game]:.1f}" for kind in ("random", "human")), *cells])
  return rows


def latex(rows: Sequence[Sequence[str]]) -> str:
  """Formats rows as a LaTeX tabular that needs the package booktabs."""
  body = [" & ".join(cell.replace("_", r"\_").replace("%", r"\%") for cell in row) + r" \\" for row in rows]
  columns = "l" + "r" * (len(rows[0]) - 1)
  return "\n".join(
    [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"]
  )


def scores_csv(methods: Mapping[str, Scores]) -> str:
  """Returns all scores as CSV: method, game, index of the run (or 'mean'), raw and human-normalised score."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["method", "game", "run", "score", "human_normalized_score"])
  for name, method in methods.items():
    for game in scores_lib.games():
      values = method.by_game.get(game, ())
      for i, (raw, hns) in enumerate(zip(values, scores_lib.normalize(game, values), strict=True)):
        writer.writerow([name, game, i if method.per_run else "mean", raw, float(hns)])
  return text.getvalue()


def aggregates_csv(aggregates: Mapping[str, Aggregate]) -> str:
  """Returns all aggregates as CSV: method, metric, value and the bounds of its interval."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["method", "metric", "value", "low", "high"])
  for name, aggregate in aggregates.items():
    for metric, estimate in aggregate.metrics.items():
      writer.writerow([name, metric, *("" if x is None else x for x in dataclasses.astuple(estimate))])
  return text.getvalue()


def _cell(estimate: Estimate | None) -> str:
  if estimate is None:
    return "-"
  if estimate.low is None or estimate.high is None:
    return f"{estimate.value:.3f}"
  return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


# ---- Figures ----


def _color(index: int, count: int) -> str | tuple[float, float, float, float]:
  """Returns one of ten strong colours, or one of twenty if `count` exceeds ten."""
  if count <= 10:
    return f"C{index}"
  import matplotlib as mpl

  return mpl.colormaps["tab20"](index % 20)


def _label(name: str, aggregate: Aggregate) -> str:
  """Returns a method's name followed by what its figures lack."""
  remarks = [f"{len(aggregate.games)} games"] if aggregate.missing else []
  remarks += ["no intervals"] if aggregate.metrics["iqm"].low is None else []
  return f"{name} ({', '.join(remarks)})" if remarks else name


def draw_aggregates(aggregates: Mapping[str, Aggregate], path: pathlib.Path) -> None:
  """Draws median, IQM, mean and optimality gap with their intervals, one row per method."""
  plt = figures.pyplot(path)
  if plt is None:
    return
  metrics = ("median", "iqm", "mean", "optimality_gap")
  figure, axes = plt.subplots(
    1, len(metrics), figsize=(2.6 * len(metrics), 0.35 * len(aggregates) + 1.1), layout="constrained", sharey=True
  )
  names = list(aggregates)
  for ax, metric in zip(axes, metrics, strict=True):
    for row, name in enumerate(names):
      estimate = aggregates[name].metrics[metric]
      color = _color(row, len(aggregates))
      if estimate.low is not None and estimate.high is not None:
        ax.barh(row, estimate.high - estimate.low, left=estimate.low, height=0.55, color=color, alpha=0.6)
      ax.plot([estimate.value] * 2, [row - 0.3, row + 0.3], color="black", linewidth=1.5)
    better = "lower" if metric in scores_lib.LOWER_IS_BETTER else "higher"
    ax.set_title(f"{LABELS[metric]} ({better} is better)", fontsize=9)
    ax.grid(axis="x", alpha=0.3)
    ax.tick_params(labelsize=8)
  axes[0].set_yticks(range(len(names)), [_label(name, aggregates[name]) for name in names])
  axes[0].invert_yaxis()
  figure.supxlabel("human-normalised score", fontsize=9)
  figures.save(figure, path, path.with_suffix(".svg"))


def draw_profiles(methods: Mapping[str, Scores], path: pathlib.Path) -> None:
  """Draws performance profiles of the methods with runs: the share of runs above each score."""
  plt = figures.pyplot(path)
  if plt is None:
    return
  figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
  thresholds = np.linspace(0, 4, 161)
  for row, (name, method) in enumerate(methods.items()):
    if method.per_run:
      ax.plot(
        thresholds,
        scores_lib.performance_profile(method, thresholds.tolist()),
        label=name,
        color=_color(row, len(methods)),
      )
  ax.set(
    xlabel="human-normalised score \u03c4", ylabel="share of runs with a score above \u03c4", ylim=(0, 1), xlim=(0, 4)
  )
  ax.axvline(1, color="gray", linewidth=0.8, linestyle=":")
  ax.grid(alpha=0.3)
  ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
  figures.save(figure, path, path.with_suffix(".svg"))


def draw_asymmetry(aggregates: Mapping[str, Aggregate], path: pathlib.Path) -> None:
  """Draws each method's mean score on Human-Optimal games over its mean on Agent-Optimal games."""
  complete = {name: a for name, a in aggregates.items() if "asymmetry" in a.metrics}
  plt = figures.pyplot(path) if complete else None
  if plt is None:
    return
  figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
  for row, (name, aggregate) in enumerate(complete.items()):
    x, y = aggregate.metrics["agent_optimal"], aggregate.metrics["human_optimal"]
    color = _color(row, len(aggregates))
    if x.low is not None and x.high is not None and y.low is not None and y.high is not None:
      bars = {"xerr": [[x.value - x.low], [x.high - x.value]], "yerr": [[y.value - y.low], [y.high - y.value]]}
      ax.errorbar(x.value, y.value, **bars, color=color, linewidth=1)
    ax.plot(x.value, y.value, "o", color=color, label=name)
  ax.set(xlabel="mean on Agent-Optimal games", ylabel="mean on Human-Optimal games")
  ax.grid(alpha=0.3)
  ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
  figures.save(figure, path, path.with_suffix(".svg"))


def draw_curves(runs: Sequence[Run], path: pathlib.Path) -> None:
  """Draws evaluations during training, one panel per game and one line per run, over environment steps and frames."""
  with_curves = [run for run in runs if run.curve]
  plt = figures.pyplot(path) if with_curves else None
  if plt is None:
    return
  names = sorted({run.game for run in with_curves})
  methods = sorted({run.method for run in with_curves})
  columns = min(4, len(names))
  rows = -(-len(names) // columns)
  figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.6 * rows), layout="constrained", squeeze=False)
  for ax in axes.flat[len(names) :]:
    ax.set_visible(False)
  for ax, game in zip(axes.flat, names, strict=False):
    labelled: set[str] = set()
    for run in (run for run in with_curves if run.game == game):
      steps, frames, returns = zip(*run.curve, strict=True)
      color = _color(methods.index(run.method), len(methods))
      label = None if run.method in labelled else run.method
      labelled.add(run.method)
      ax.plot(steps, returns, color=color, alpha=0.8, linewidth=1.2, marker=".", label=label)
      ratio = frames[-1] / max(steps[-1], 1)
    ax.set_title(game, fontsize=9)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)
    if ratio > 1:
      above = ax.secondary_xaxis("top", functions=(lambda x, r=ratio: x * r, lambda x, r=ratio: x / r))
      above.tick_params(labelsize=6)
  lines = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
  axes.flat[0].legend([lines[label] for label in sorted(lines)], sorted(lines), fontsize=7)
  figure.supxlabel("environment steps (above: frames)", fontsize=9)
  figure.supylabel("mean return", fontsize=9)
  figures.save(figure, path, path.with_suffix(".svg"))


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file of the report.

  Raises:
    UserError: if the file cannot be written.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  except OSError as error:
    raise UserError(f"cannot write {path}: {error.strerror}") from None


def notes_text(notes: Sequence[str]) -> str:
  """Formats notes as a Markdown list."""
  return "\n".join(f"- {note}" for note in notes) if notes else "- Every game and run counts."


def sources(methods: Mapping[str, Scores]) -> list[str]:
  """Returns one line for each method with a source: the citation, the kind of its scores, and caveats."""
  lines: list[str] = []
  for name, method in methods.items():
    if method.source:
      kind = "runs" if method.per_run else "game means: no intervals, and an IQM not comparable with that of runs"
      lines.append(f"{name}: {method.source} ({kind}). {method.note}".strip())
  return lines


def to_json(aggregates: Mapping[str, Aggregate]) -> dict[str, Any]:
  """Converts aggregates to JSON values."""
  return {name: dataclasses.asdict(aggregate) for name, aggregate in aggregates.items()}
