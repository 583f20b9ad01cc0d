"""Turns result.json files into the tables and figures of a paper, with published methods for comparison.

  python experiments/report.py --results='runs/**/result.json' --out=report --compare=DIAMOND,IRIS
  python experiments/report.py --methods

Prints the aggregates of Atari 100k and a table for each MinAtar game. With --out, also writes report.md, figures as PNG
and SVG, with --latex report.tex, and scores.csv, aggregates.csv and aggregates.json of Atari 100k or minatar.csv. The
report names missing games and runs and never fills them in, and the runs on recorded episodes, which play no games.
docs/evaluation.md describes the conventions.
"""

import glob
import os
import pathlib

from absl import flags

import jedi_jax
from jedi_jax.evaluation import minatar, report
from jedi_jax.evaluation import scores as scores_lib
from jedi_jax.runs import program, workdir
from jedi_jax.tables import markdown_table

_RESULTS = flags.DEFINE_multi_string("results", [], "Pattern of result.json files, ** for any depth; may be repeated.")
_OUT = flags.DEFINE_string("out", None, "Directory of the report; required with --results and --latex.")
_COMPARE = flags.DEFINE_list("compare", [], "Published methods to compare with; --methods lists them.")
_METHODS = flags.DEFINE_bool("methods", default=False, help="Includes all published methods.")
_REPS = flags.DEFINE_integer(
  "reps", 2_000, "Bootstrap replications; 0 omits the intervals.", lower_bound=0, upper_bound=10**6
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.", lower_bound=0, upper_bound=2**32 - 1)
_LATEX = flags.DEFINE_bool("latex", default=False, help="Also writes report.tex.")


def main() -> None:
  """Reads the flags and the results, prints the aggregates and writes the report."""
  if not _RESULTS.value and not _METHODS.value:
    raise jedi_jax.UserError("nothing to report: name --results, or --methods for the published ones")
  if (_RESULTS.value or _LATEX.value) and not _OUT.value:
    raise jedi_jax.UserError("--out is missing: name a directory")
  patterns = [os.path.expanduser(pattern) for pattern in _RESULTS.value]
  paths = sorted({pathlib.Path(path) for pattern in patterns for path in glob.glob(pattern, recursive=True)})
  if _RESULTS.value and not paths:
    raise jedi_jax.UserError(f"no file matches {', '.join(_RESULTS.value)}")
  runs, skipped = report.read_runs(paths)
  methods, notes = report.collect(runs)
  notes = skipped + notes
  ours = list(methods)
  compared = scores_lib.published() if _METHODS.value else {}
  compared |= {method.name: method for method in scores_lib.find_published(_COMPARE.value)}
  for name, method in compared.items():
    if not method.by_game:
      figures = ", ".join(f"{metric} {value}" for metric, value in method.published.items())
      notes.append(f"{name}: no scores by game are available; reported elsewhere: {figures} ({method.source}).")
    elif name in methods:
      raise jedi_jax.UserError(f"{name} is both a method of --results and of --compare")
    else:
      methods[name] = method
  boards = minatar.compare(runs, reps=_REPS.value, seed=_SEED.value)
  if not methods and not boards:
    raise jedi_jax.UserError(". ".join(["no result is of an Atari 100k or MinAtar game", *skipped]))

  aggregates = {
    name: scores_lib.aggregate(method, reps=_REPS.value, seed=_SEED.value) for name, method in methods.items()
  }
  for name, aggregate in aggregates.items():
    notes += report.describe_gaps(name, aggregate)
  if methods:
    print(markdown_table(report.aggregate_table(methods, aggregates)))
  if methods or notes:
    print(report.notes_text(notes))
  if boards:
    print(_minatar_text(runs, boards))
  if not _OUT.value:
    return
  out, parts, tables = workdir.locate(_OUT.value), [], []
  if methods:
    parts += _write_atari(out, methods, ours, aggregates, notes)
    tables += [report.aggregate_table(methods, aggregates), report.game_table(methods)]
  elif notes:
    parts += ["# Notes", "", report.notes_text(notes), ""]
  if boards:
    parts.append(_minatar_text(runs, boards))
    tables += minatar.tables(boards).values()
    report.write_text(out / "minatar.csv", minatar.to_csv(boards))
  report.write_text(out / "report.md", "\n".join(parts))
  if _LATEX.value:
    report.write_text(out / "report.tex", "\n\n".join(map(report.latex, tables)) + "\n")
  report.draw_curves(runs, out / "curves.png")
  print(f"written to {out / 'report.md'}")


def _minatar_text(runs: list[report.Run], boards: list[minatar.Row]) -> str:
  """Returns the Markdown section on MinAtar."""
  reps = f"95% intervals of the mean by percentile bootstrap over runs ({_REPS.value:,} replications)."
  parts = ["# MinAtar", "", f"Mean returns; {reps}", ""]
  for game, table in minatar.tables(boards).items():
    parts += [f"## {game}", "", markdown_table(table), ""]
  return "\n".join([*parts, "## Protocols", "", report.notes_text([*minatar.PROTOCOLS, *minatar.notes(runs)]), ""])


def _write_atari(
  out: pathlib.Path,
  methods: dict[str, scores_lib.Scores],
  ours: list[str],
  aggregates: dict[str, scores_lib.Aggregate],
  notes: list[str],
) -> list[str]:
  """Writes the tables and figures of Atari 100k; `ours` names the methods of --results. Returns Markdown lines."""
  table, games = report.aggregate_table(methods, aggregates), report.game_table(methods)
  report.write_text(out / "scores.csv", report.scores_csv(methods))
  report.write_text(out / "aggregates.csv", report.aggregates_csv(aggregates))
  workdir.write_json(out / "aggregates.json", report.to_json(aggregates))
  report.draw_aggregates(aggregates, out / "aggregates.png")
  report.draw_profiles(methods, out / "profiles.png")
  report.draw_asymmetry(aggregates, out / "asymmetry.png")
  return [
    "# Atari 100k",
    "",
    f"Human-normalised scores; 95% intervals by stratified bootstrap over runs ({_REPS.value:,} replications).",
    "",
    markdown_table(table),
    "",
    "## Notes",
    "",
    report.notes_text(notes),
    "",
    *_improvement(methods, ours),
    "## Raw scores",
    "",
    markdown_table(games),
    "",
    "## Sources",
    "",
    report.notes_text(report.sources(methods) or ["All scores are of the given runs."]),
    "",
  ]


def _improvement(methods: dict[str, scores_lib.Scores], ours: list[str]) -> list[str]:
  """Returns Markdown lines with the probability of improvement of each of our methods over each other method."""
  rows = [["X", "Y", "P(X > Y)", "games"]]
  for x in ours:
    for y, other in methods.items():
      if y != x and other.per_run:
        probability, shared = scores_lib.probability_of_improvement(methods[x], other)
        rows.append([x, y, f"{probability:.3f}", str(len(shared))])
  return ["## Probability of improvement", "", markdown_table(rows), ""] if len(rows) > 1 else []


if __name__ == "__main__":
  program.run(main, __doc__ or "")
