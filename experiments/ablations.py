"""Trains and draws the paper's two ablation figures, or the choices that the paper does not give.

  python experiments/ablations.py --figure=gradients,targets --preset=catch --seeds=3 --out=runs/ablations

Figure `gradients`: which losses shape the latent space. Figure `targets`: how the denoiser's later targets are
conditioned, and what stabilises them. Figure `choices`: constants that the paper does not give (see docs/choices.md).
Every run has its own workdir under --out; finished runs are not repeated, interrupted ones are resumed. The table and,
with matplotlib, the figures are written to --out.
"""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from absl import flags

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax.errors import nearest
from jedi_jax.runs import figures as figures_lib
from jedi_jax.runs import program, workdir
from jedi_jax.tables import markdown_table

_ENV = flags.DEFINE_string("env", None, "Environment of all runs; the preset's by default.")
_PRESET = flags.DEFINE_string("preset", "catch", "Preset of all runs.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=1, upper_bound=1_000)
_FIGURE = flags.DEFINE_list("figure", ["gradients", "targets"], "Which figures: gradients, targets, choices.")
_ARMS = flags.DEFINE_list("arms", [], "Names of the arms to run; all by default.")
_OUT = flags.DEFINE_string("out", None, "Directory of the runs, the table and the figures.")
_SET = flags.DEFINE_multi_string("set", [], "Overrides a setting in all runs; may be repeated.")


class Measured(NamedTuple):
  """Results of one run; the figures of the world model are None without an evaluation during training.

  Attributes:
    mean_return: mean return of the final evaluation.
    error: error of open-loop imagination after H steps, over that of copies of the last real latent.
    f1_real: F1 score of rewards and ends on real latents.
    f1_imagined: the same on imagined latents.
    calibration: of the sampler; see docs/metrics.md.
  """

  mean_return: float
  error: float | None
  f1_real: float | None
  f1_imagined: float | None
  calibration: float | None


_WATCHED = ("error_last", "f1_real", "f1_imagined", "calibration")
_PIXEL_SCALE = {
  "denoiser.sigma_data": 0.5,
  "denoiser.offset_noise": 0.3,
  "denoiser.sigma_log_mean": -0.4,
  "denoiser.sigma_min": 0.002,
  "denoiser.sigma_max": 20.0,
  "sampler.sigma_min": 0.002,
  "sampler.sigma_max": 5.0,
}
"""DIAMOND's noise levels."""

# In the paper's order, best first. An arm is a variant and its settings.
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
  "choices": {
    "preset": ("jedi", {}),
    "sequential order": ("jedi", {"training.order": "sequential"}),
    "alternating order": ("jedi", {"training.order": "alternating"}),
    "norm per frame": ("jedi", {"encoder.norm": "frame"}),
    "no norm, DIAMOND's noise levels": ("jedi", {"encoder.norm": "none", **_PIXEL_SCALE}),
    "no norm, DIAMOND's noise levels, policy's input normalised": (
      "jedi",
      {"encoder.norm": "none", "actor_critic.input_norm": "frame", **_PIXEL_SCALE},
    ),
    "no offset noise": ("jedi", {"denoiser.offset_noise": 0.0}),
    "change as target": ("jedi", {"denoiser.target": "change", "denoiser.clamp_estimate": False}),
    "sampling from unit noise": ("jedi", {"sampler.start": "unit"}),
    "1 sampler step": ("jedi", {"sampler.num_steps": 1}),
    "5 sampler steps": ("jedi", {"sampler.num_steps": 5}),
    "noise on rewards' latents": ("jedi", {"reward_end.noise": 0.2}),
    "age groups by steps": ("jedi", {"replay.age_groups": "steps"}),
    "restart after an end": ("jedi", {"actor_critic.restart_after_end": True}),
    "coin: always encoder": ("jedi", {"denoiser.switching": "always_encoder"}),
    "encoder rate x 1": ("jedi", {"encoder.learning_rate_factor": 1.0}),
    "encoder rate x 0.3": ("jedi", {"encoder.learning_rate_factor": 0.3}),
    "encoder rate x 0.1": ("jedi", {"encoder.learning_rate_factor": 0.1}),
    "no average of the denoiser": ("jedi", {"denoiser.average_decay": 0.0}),
    "no reward gradient": ("jedi", {"encoder.learns_from": ("prediction",)}),
    "depth 2": ("jedi", {"denoiser.depths": (2,)}),
  },
}


def main() -> None:
  """Trains the missing runs, and writes the table and the figures."""
  if not _OUT.value:
    raise jedi_jax.UserError("--out is missing: name a directory")
  for name in _FIGURE.value:
    if name not in FIGURES:
      raise jedi_jax.UserError(f"unknown figure {name!r}{nearest(name, FIGURES)}")
  known = {arm for name in _FIGURE.value for arm in FIGURES[name]}
  for arm in _ARMS.value:
    if arm not in known:
      raise jedi_jax.UserError(f"unknown arm {arm!r}{nearest(arm, known)}")
  program.enable_compilation_cache()
  out = workdir.locate(_OUT.value)
  shared = dict(config_lib.split_override(text) for text in _SET.value)
  report: dict[str, dict[str, list[Measured]]] = {}
  for figure in _FIGURE.value:
    report[figure] = {
      name: _run_arm(out, variant, {**shared, **values}, values)
      for name, (variant, values) in FIGURES[figure].items()
      if not _ARMS.value or name in _ARMS.value
    }
  plain = {
    figure: {arm: [run._asdict() for run in runs] for arm, runs in arms.items()} for figure, arms in report.items()
  }
  about = {"env": _ENV.value, "preset": _PRESET.value, "set": _SET.value, "seeds": _SEEDS.value}
  workdir.write_json(out / "ablations.json", {**about, "figures": plain})
  table = _table(report)
  (out / "ablations.md").write_text(table)
  print(table)
  for figure, arms in report.items():
    _draw(figure, arms, out / f"{figure}.png")


def _run_arm(out: pathlib.Path, variant: str, values: Mapping[str, Any], own: Mapping[str, Any]) -> list[Measured]:
  """Trains all seeds of one arm."""
  name = "-".join([variant, *(f"{path.split('.')[-1]}_{value}" for path, value in own.items())])
  measured = []
  for seed in range(_SEEDS.value):
    config = config_lib.make_config(env=_ENV.value, variant=variant, preset=_PRESET.value, seed=seed, overrides=values)
    directory = out / name / f"seed_{seed}"
    result = jedi_jax.train(config, directory)
    jax.clear_caches()  # Every run compiles its own programs; without this, all stay in memory.
    last: dict[str, Any] = {}
    for line in workdir.read_metrics(workdir.read(directory).metrics):
      last |= {name: line[f"world_model/{name}"] for name in _WATCHED if line.get(f"world_model/{name}") is not None}
    measured.append(Measured(float(result["mean_return"]), *(last.get(name) for name in _WATCHED)))
  return measured


def _table(report: Mapping[str, Mapping[str, list[Measured]]]) -> str:
  lines = []
  for figure, arms in report.items():
    rows = [["arm", "mean return", "by seed", "error over copying", "F1, real", "F1, imagined", "calibration"]]
    for name, runs in arms.items():
      returns = [run.mean_return for run in runs]
      figures = ([getattr(run, field) for run in runs] for field in Measured._fields[1:])
      cells = [f"{statistics.mean(found):.2f}" if None not in found else "-" for found in figures]
      rows.append([name, f"{statistics.mean(returns):.2f}", ", ".join(f"{x:.2f}" for x in returns), *cells])
    lines += [f"## {figure}", "", markdown_table(rows), ""]
  return "\n".join(lines)


def _draw(figure: str, arms: Mapping[str, list[Measured]], path: pathlib.Path) -> None:
  """Draws the returns (left) and errors (right) of all arms: a bar for the mean, a point for each seed."""
  plt = figures_lib.pyplot(path)
  if plt is None:
    return
  fig, axes = plt.subplots(1, 2, figsize=(10, 0.4 * len(arms) + 1.4), layout="constrained", sharey=True)
  sides = (("mean_return", "mean return"), ("error", "open-loop error over copying"))
  for ax, (attribute, label) in zip(axes, sides, strict=True):
    for row, (name, runs) in enumerate(arms.items()):
      numbers = [x for run in runs if (x := getattr(run, attribute)) is not None]
      if not numbers:
        continue
      color = "tab:blue" if name in ("JEDI", "preset") else "tab:gray"
      ax.barh(row, statistics.mean(numbers), color=color, alpha=0.5, height=0.6)
      ax.plot(numbers, [row] * len(numbers), "k.", markersize=5)
    ax.axvline(0, color="black", linewidth=0.5)
    ax.set_xlabel(label)
  axes[0].set_yticks(range(len(arms)), list(arms))
  axes[0].invert_yaxis()
  fig.suptitle(f"{figure} ({_SEEDS.value} seeds)")
  figures_lib.save(fig, path)


if __name__ == "__main__":
  program.run(main, __doc__ or "")
