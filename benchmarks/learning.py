"""Summarises finished runs of one setting and draws their learning curves.

  python benchmarks/learning.py --name=catch --runs='runs/catch/seed_*' --random=runs/catch/random.json

Prints a Markdown table and writes benchmarks/results/learning/<name>.json and <name>.png. The JSON file contains each
run's command, final games, curve and seconds, and the figures of its world model: of diagnosis.json if there is one,
else of the last evaluation during training. Errors are over those of copying. Runs in several directories, such as the
arms of experiments/ablations.py, are also printed by directory. --random is an output file of experiments/evaluate.py
--random. With --unfinished, runs that were stopped count with the games of evaluation.json or, without it, of their
last `LAST_EPOCHS` epochs of training.
"""

import glob
import itertools
import math
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

import record
from absl import flags

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax.runs import figures, program, workdir
from jedi_jax.runs import metrics as run_metrics

_NAME = flags.DEFINE_string("name", None, "Name of the record.", required=True)
_RUNS = flags.DEFINE_string("runs", None, "Pattern of the runs' directories.", required=True)
_UNFINISHED = flags.DEFINE_bool("unfinished", default=False, help="Runs may be unfinished.")
_RANDOM = flags.DEFINE_string("random", None, "Evaluation file of the random policy.")

LAST_EPOCHS = 10
"""Epochs whose games stand for those of a final evaluation in an unfinished run."""


def main() -> None:
  """Reads the runs, and writes and draws the summary."""
  paths = [pathlib.Path(path) for path in sorted(glob.glob(_RUNS.value))]
  if not paths:
    raise jedi_jax.UserError(f"--runs: no directory matches {_RUNS.value}")
  rows = [_row(path) for path in paths]
  if _RANDOM.value:
    rows.append({"run": "random policy", **_games(workdir.read_json(pathlib.Path(_RANDOM.value)))})
  written = record.write(f"learning/{_NAME.value}", rows, started=record.machine())
  columns = ["run", "env_steps", "mean_return", "interval", "games", "seconds"]
  if any("error_last" in row for row in rows):
    columns += ["latent_deviation", "error_1", "error_last", "f1_real", "f1_imagined", "calibration"]
  print(record.table(rows, columns))
  if by_directory := _by_directory(rows):
    print(record.table(by_directory, list(by_directory[0])))
  print(f"written to {written}")
  _draw(rows, written.with_suffix(".png"))


def _fixed(pattern: str) -> pathlib.Path:
  """Returns the part of a pattern's directory before its first wildcard."""
  parts = pathlib.Path(pattern).parts
  fixed = itertools.takewhile(lambda part: not set(part) & set("*?["), parts[:-1])
  return pathlib.Path(*fixed)


def _games(result: dict[str, Any]) -> dict[str, Any]:
  """Returns the mean return of whole games and its 95% interval by the normal approximation."""
  returns = result["episode_returns"]
  half = 1.96 * statistics.stdev(returns) / math.sqrt(len(returns)) if len(returns) > 1 else math.nan
  mean = result["mean_return"]
  return {
    "mean_return": mean,
    "interval": f"{mean - half:.2f} to {mean + half:.2f}" if len(returns) > 1 else "-",
    "games": len(returns),
    "returns": returns,
  }


def _training_games(records: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the mean return of the games that ended in the last epochs of training with any, and their number."""
  ended = [record for record in records if record.get("collect/episodes")][-LAST_EPOCHS:]
  games = sum(record["collect/episodes"] for record in ended)
  total = sum(record["collect/episodes"] * record["collect/return"] for record in ended)
  return {"mean_return": total / games if games else None, "interval": "-", "games": games}


def _row(path: pathlib.Path) -> dict[str, Any]:
  run = workdir.read(path)
  records = workdir.read_metrics(run.metrics)
  if run.data is not None:
    raise jedi_jax.UserError(f"{path} was trained on recorded episodes: it has no games")
  if run.result.exists():
    result = workdir.read_json(run.result)
    games = _games(result)
  elif _UNFINISHED.value and records:
    games = _games(workdir.read_json(run.evaluation)) if run.evaluation.exists() else _training_games(records)
    updates = {name: records[-1].get(f"updates/{name}") for name in run_metrics.PHASES}
    result = {"env_steps": records[-1]["env_steps"], "seconds": records[-1]["time/total_seconds"], "updates": updates}
  else:
    raise jedi_jax.UserError(f"{path} is not finished: train it to its end first, or give --unfinished")
  config = run.config
  preset = config_lib.make_config(env=config.env.name, variant=config.variant, preset=config.preset, seed=config.seed)
  flat = config_lib.flatten(config_lib.to_dict(config))
  default = config_lib.flatten(config_lib.to_dict(preset))
  changed = [f"--set={name}={flat[name]}" for name in flat if flat[name] != default[name]]
  command = ["python experiments/train.py", f"--env={config.env.name}", f"--variant={config.variant}"]
  command += [f"--preset={config.preset}", f"--seed={config.seed}", *changed]
  names = ("env_steps", "evaluation/return", "collect/return", "collect/episodes", "collect/rewards_positive")
  names += ("actor_critic/imagined_return", "denoiser/encoder_movement", "time/total_seconds")
  return {
    "run": path.relative_to(_fixed(_RUNS.value)).as_posix(),
    "command": " ".join(command),
    "env_steps": result["env_steps"],
    "updates": result["updates"],
    "seconds": round(result["seconds"]),
    **games,
    **_world_model(run.diagnosis, records),
    "curve": {name: [line.get(name) for line in records] for name in names},
  }


def _world_model(diagnosis: pathlib.Path, records: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the figures of a world model on new games or, without a diagnosis, on replay; empty if there are none."""
  if diagnosis.exists():
    found = workdir.read_json(diagnosis)
    over_copying = [e / c for e, c in zip(found["open_loop"]["error"], found["open_loop"]["copying"], strict=True)]
    return {
      "latent_deviation": found["latents"].get("latent_deviation"),
      "error_1": over_copying[0],
      "error_last": over_copying[-1],
      "f1_real": found["rewards_ends"]["on_real"]["f1"],
      "f1_imagined": found["rewards_ends"]["in_imagination"]["f1"],
      "calibration": found.get("sampler", {}).get("calibration"),
      "value_correlation": found["value"]["correlation"],
      "weakest": found["weakest"],
    }
  watched = [record for record in records if record.get("world_model/error_last") is not None]
  if not watched:
    return {}
  names = ("error_1", "error_last", "f1_real", "f1_imagined", "calibration")
  figures = {name: watched[-1].get(f"world_model/{name}") for name in names}
  return {"latent_deviation": watched[-1].get("denoiser/latent_deviation"), **figures}


def _by_directory(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns means over the runs of each directory; empty if there is one alone."""
  groups: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    if "curve" in row:
      groups.setdefault(str(pathlib.PurePath(row["run"]).parent), []).append(row)
  return [_means(name, group) for name, group in groups.items()] if len(groups) > 1 else []


def _means(name: str, group: list[dict[str, Any]]) -> dict[str, Any]:
  def mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3g}" if known else "-"

  def late(curve: str) -> str:
    known = ([value for value in row["curve"][curve] if value is not None] for row in group)
    return mean(value for values in known for value in values[-LAST_EPOCHS // 2 :])

  return {
    "directory": name,
    "mean return": mean(row["mean_return"] for row in group),
    "by run": ", ".join("-" if row["mean_return"] is None else f"{row['mean_return']:.2f}" for row in group),
    f"training games, last {LAST_EPOCHS // 2} epochs": late("collect/return"),
    "encoder's movement": late("denoiser/encoder_movement"),
    **{name: mean(row.get(name) for row in group) for name in ("error_1", "error_last", "f1_real", "f1_imagined")},
    "seconds": mean(row["seconds"] for row in group),
  }


def _draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  plt = figures.pyplot(path)
  if plt is None:
    return
  figure, (left, right) = plt.subplots(1, 2, figsize=(13, 3.6), layout="constrained")
  drawn = [row["curve"] for row in rows if "curve" in row]
  evaluated = any(sum(value is not None for value in curve["evaluation/return"]) > 1 for curve in drawn)
  left.set_prop_cycle(color=plt.get_cmap("tab10" if len(rows) <= 10 else "tab20").colors)
  for row in rows:
    if "curve" not in row:
      left.axhline(row["mean_return"], linestyle="--", color="gray", label="random policy")
      continue
    curve = row["curve"]
    games = curve["evaluation/return" if evaluated else "collect/return"]
    points = [(x, y) for x, y in zip(curve["env_steps"], games, strict=True) if y is not None]
    points.append((row["env_steps"], row["mean_return"]))
    (line,) = left.plot(*zip(*points, strict=True), marker=".", label=row["run"])
    pairs = zip(curve["env_steps"], curve["actor_critic/imagined_return"], strict=True)
    imagined = [(x, y) for x, y in pairs if y is not None]
    right.plot(*zip(*imagined, strict=True), color=line.get_color())
  kind = "whole games" if evaluated else "games of training"
  left.set(title=f"{kind} (the last point: final evaluation)", xlabel="environment steps", ylabel="mean return")
  right.set(title="imagined, within the horizon", xlabel="environment steps", ylabel="sum of reward signs")
  figure.legend(fontsize=8, loc="outside right upper")
  figure.suptitle(_NAME.value)
  figures.save(figure, path)


if __name__ == "__main__":
  program.run(main, __doc__ or "")
