"""Runs the paper's two ablation figures on an environment of your choice, and draws them.

  python experiments/ablations.py --env=catch --preset=small --seeds=3 --out=runs/ablations

Figure `gradients`: which losses shape the latent space. Figure `targets`: how the denoiser's later targets are
conditioned, and what stabilises them. Every run has a workdir of its own under --out and is trained like any other:
finished runs are not repeated, interrupted ones go on. The table and the figure (with matplotlib) are written to --out.
"""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from absl import flags

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax import runtime, workdir

_ENV = flags.DEFINE_string("env", "catch", "Environment of all runs.")
_PRESET = flags.DEFINE_string("preset", "small", "Preset of all runs.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=1)
_FIGURE = flags.DEFINE_enum("figure", "both", ["gradients", "targets", "both"], "Which figure.")
_OUT = flags.DEFINE_string("out", None, "Directory of the runs, the table and the figures.")
_SET = flags.DEFINE_multi_string("set", [], "Overrides a setting in all runs; may be repeated.")

# In the paper's order, best first. An arm is a variant and what it sets.
FIGURES: Mapping[str, Mapping[str, tuple[str, Mapping[str, Any]]]] = {
  "gradients": {
    "JEDI": ("jedi", {}),
    "MSE": ("mse", {}),
    "no diffusion gradient": ("no_diffusion_gradient", {}),
    "decoder gradient": ("decoder_gradient", {}),
    "autoencoder": ("autoencoder", {}),
  },
  "targets": {
    "JEDI": ("jedi", {}),
    "EMA target": ("jedi", {"encoder.target_decay": 0.99}),
    "alternating": ("jedi", {"denoiser.switching": "alternate"}),
    "no switching": ("jedi", {"denoiser.switching": "always_denoiser"}),
    "no switching, no clamp": ("jedi", {"denoiser.switching": "always_denoiser", "encoder.clamp": 0.0}),
  },
}


def main() -> None:
  """Reads the flags, trains what is missing, and reports."""
  if not _OUT.value:
    raise jedi_jax.UserError("--out is missing: name a directory")
  runtime.enable_compilation_cache()
  out = pathlib.Path(_OUT.value)
  shared = dict(config_lib.split_override(text) for text in _SET.value)
  report: dict[str, Any] = {}
  for figure in FIGURES if _FIGURE.value == "both" else (_FIGURE.value,):
    report[figure] = {
      name: _run_arm(out, variant, {**shared, **values}) for name, (variant, values) in FIGURES[figure].items()
    }
  workdir.write_json(out / "ablations.json", {"env": _ENV.value, "preset": _PRESET.value, "mean_returns": report})
  table = _table(report)
  (out / "ablations.md").write_text(table)
  print(table)
  for figure, arms in report.items():
    _draw(figure, arms, out / f"{figure}.png")


def _run_arm(out: pathlib.Path, variant: str, values: Mapping[str, Any]) -> list[float]:
  """Trains the seeds of one arm; returns each one's mean return."""
  name = "-".join([variant, *(f"{path.split('.')[-1]}_{value}" for path, value in values.items())])
  returns = []
  for seed in range(_SEEDS.value):
    config = config_lib.make_config(env=_ENV.value, variant=variant, preset=_PRESET.value, seed=seed, overrides=values)
    returns.append(float(jedi_jax.train(config, out / name / f"seed_{seed}")["mean_return"]))
  return returns


def _table(report: Mapping[str, Mapping[str, list[float]]]) -> str:
  lines = []
  for figure, arms in report.items():
    lines += [f"## {figure}", "", "| arm | mean return | by seed |", "|---|---|---|"]
    for name, returns in arms.items():
      lines.append(f"| {name} | {statistics.mean(returns):.2f} | {', '.join(f'{x:.2f}' for x in returns)} |")
    lines.append("")
  return "\n".join(lines)


def _draw(figure: str, arms: Mapping[str, list[float]], path: pathlib.Path) -> None:
  """Draws each seed as a point and each arm's mean as a bar."""
  try:
    import matplotlib as mpl
  except ImportError:
    print(f"{path.name} is not drawn: matplotlib is missing (pip install 'jedi_jax[plots]')")
    return
  mpl.use("Agg")
  from matplotlib import pyplot as plt

  fig, axes = plt.subplots(figsize=(6, 0.5 * len(arms) + 1.2), layout="constrained")
  for row, (name, returns) in enumerate(arms.items()):
    axes.barh(row, statistics.mean(returns), color="tab:blue" if name == "JEDI" else "tab:gray", alpha=0.5, height=0.6)
    axes.plot(returns, [row] * len(returns), "k.", markersize=5)
  axes.set_yticks(range(len(arms)), list(arms))
  axes.invert_yaxis()
  axes.axvline(0, color="black", linewidth=0.5)
  axes.set_xlabel(f"mean return on {_ENV.value} ({_SEEDS.value} seeds)")
  axes.set_title(figure)
  fig.savefig(path, dpi=150)
  plt.close(fig)
  print(f"written to {path}")


if __name__ == "__main__":
  runtime.run(main, __doc__ or "")
