"""Turns result.json files into the tables and figures of a paper, with published methods for comparison.

  python experiments/report.py --results='runs/**/result.json' --out=report --compare=DIAMOND,IRIS
  python experiments/report.py --methods

Prints the aggregates. With --out, also writes report.md, scores.csv, aggregates.csv, aggregates.json, figures as PNG
and SVG, and with --latex report.tex. The report names missing games and runs and never fills them in.
docs/evaluation.md describes the conventions.
"""

import glob
import pathlib

from absl import flags

import jedi_jax
from jedi_jax.evaluation import report
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
  paths = sorted({pathlib.Path(path) for pattern in _RESULTS.value for path in glob.glob(pattern, recursive=True)})
  if _RESULTS.value and not paths:
    raise jedi_jax.UserError(f"no file matches {', '.join(_RESULTS.value)}")
  runs = [report.read_run(path) for path in paths]
  methods, notes = report.collect(runs)
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
  if not methods:
    raise jedi_jax.UserError("no result is of an Atari 100k game")

  aggregates = {
    name: scores_lib.aggregate(method, reps=_REPS.value, seed=_SEED.value) for name, method in methods.items()
  }
  for name, aggregate in aggregates.items():
    notes += report.describe_gaps(name, aggregate)
  print(markdown_table(report.aggregate_table(methods, aggregates)))
  print(report.notes_text(notes))
  if _OUT.value:
    _write(pathlib.Path(_OUT.value), runs, methods, ours, aggregates, notes)


def _write(
  out: pathlib.Path,
  runs: list[report.Run],
  methods: dict[str, scores_lib.Scores],
  ours: list[str],
  aggregates: dict[str, scores_lib.Aggregate],
  notes: list[str],
) -> None:
  """Writes the files of the report; `ours` names the methods of --results."""
  table, games = report.aggregate_table(methods, aggregates), report.game_table(methods)
  parts = [
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
  report.write_text(out / "report.md", "\n".join(parts))
  report.write_text(out / "scores.csv", report.scores_csv(methods))
  report.write_text(out / "aggregates.csv", report.aggregates_csv(aggregates))
  workdir.write_json(out / "aggregates.json", report.to_json(aggregates))
  if _LATEX.value:
    report.write_text(out / "report.tex", report.latex(table) + "\n\n" + report.latex(games) + "\n")
  report.draw_aggregates(aggregates, out / "aggregates.png")
  report.draw_profiles(methods, out / "profiles.png")
  report.draw_asymmetry(aggregates, out / "asymmetry.png")
  report.draw_curves(runs, out / "curves.png")
  print(f"written to {out / 'report.md'}")


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
