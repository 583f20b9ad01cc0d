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
from jedi_jax.config import VARIANTS
from jedi_jax.errors import nearest
from jedi_jax.inspection import diagnosis
from jedi_jax.runs import figures as figures_lib
from jedi_jax.runs import program, workdir
from jedi_jax.tables import markdown_table

_ENV = flags.DEFINE_string("env", None, "Environment of all runs; the preset's by default.")
_PRESET = flags.DEFINE_string("preset", "catch", "Preset of all runs.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=1, upper_bound=1_000)
_FIGURE = flags.DEFINE_list("figure", ["gradients", "targets"], "Which figures: gradients, targets, choices.")
_ARMS = flags.DEFINE_list("arms", [], "Names of the arms to run; all by default.")
_OUT = flags.DEFINE_string("out", None, "Directory of the runs, the table and the figures.")
_STEPS = flags.DEFINE_integer(
  "diagnosis_steps", 1_600, "Environment steps of each run's diagnosis.", lower_bound=1, upper_bound=10**6
)
_SET = flags.DEFINE_multi_string("set", [], "Overrides a setting in all runs; may be repeated.")


class Measured(NamedTuple):
  """Results of one run.

  Attributes:
    mean_return: mean return of the final evaluation.
    error: root mean square error of open-loop imagination after H steps, in standard deviations of the latents.
    copying: the same error for copies of the last real latent.
    f1: F1 score of rewards and ends in imagination, None with too few examples.
  """

  mean_return: float
  error: float
  copying: float
  f1: float | None


_PIXEL_SCALE = {
  path: VARIANTS["diamond"][path] for path in VARIANTS["diamond"] if path.split(".")[1].startswith(("sigma", "offset"))
}

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
    "joint update": ("jedi", {"training.order": "joint"}),
    "no norm, DIAMOND's scale": ("jedi", {"encoder.norm": "none", **_PIXEL_SCALE}),
    "no norm, DIAMOND's scale, policy's input normalised": (
      "jedi",
      {"encoder.norm": "none", "actor_critic.input_norm": "frame", **_PIXEL_SCALE},
    ),
    "running norm": ("jedi", {"encoder.norm": "running"}),
    "no offset noise": ("jedi", {"denoiser.offset_noise": 0.0}),
    "change as target": ("jedi", {"denoiser.target": "change", "denoiser.clamp_estimate": False}),
    "sampling from unit noise": ("jedi", {"sampler.start": "unit"}),
    "sampling from sigma_max": ("jedi", {"sampler.start": "sigma_max"}),
    "1 sampler step": ("jedi", {"sampler.num_steps": 1}),
    "5 sampler steps": ("jedi", {"sampler.num_steps": 5}),
    "noise on rewards' latents": ("jedi", {"reward_end.noise": 0.2}),
    "age groups by steps": ("jedi", {"replay.age_groups": "steps"}),
    "restart after an end": ("jedi", {"actor_critic.restart_after_end": True}),
    "coin: always encoder": ("jedi", {"denoiser.switching": "always_encoder"}),
    "encoder rate x 1": ("jedi", {"encoder.learning_rate_factor": 1.0}),
    "encoder rate x 0.1": ("jedi", {"encoder.learning_rate_factor": 0.1}),
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
  out = pathlib.Path(_OUT.value)
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
  """Trains and diagnoses all seeds of one arm."""
  name = "-".join([variant, *(f"{path.split('.')[-1]}_{value}" for path, value in own.items())])
  measured = []
  for seed in range(_SEEDS.value):
    config = config_lib.make_config(env=_ENV.value, variant=variant, preset=_PRESET.value, seed=seed, overrides=values)
    directory = out / name / f"seed_{seed}"
    result = jedi_jax.train(config, directory)
    written = directory / "diagnosis.json"
    jax.clear_caches()  # Every run compiles its own programs; without this, all stay in memory.
    figures = workdir.read_json(written) if written.exists() else None
    if figures is None:
      figures = diagnosis.diagnose_run(directory, steps=_STEPS.value)
    loop = figures["open_loop"]
    f1 = figures["rewards_ends"]["in_imagination"]["f1"]
    measured.append(Measured(float(result["mean_return"]), loop["error"][-1], loop["copying"][-1], f1))
  return measured


def _table(report: Mapping[str, Mapping[str, list[Measured]]]) -> str:
  lines = []
  for figure, arms in report.items():
    rows = [["arm", "mean return", "by seed", "open-loop error", "by seed", "copying", "F1 in imagination"]]
    for name, runs in arms.items():
      returns, errors = [run.mean_return for run in runs], [run.error for run in runs]
      scores = [run.f1 for run in runs if run.f1 is not None]
      cells = [
        name,
        f"{statistics.mean(returns):.2f}",
        ", ".join(f"{x:.2f}" for x in returns),
        f"{statistics.mean(errors):.3f}",
        ", ".join(f"{x:.3f}" for x in errors),
        f"{statistics.mean(run.copying for run in runs):.3f}",
        f"{statistics.mean(scores):.2f}" if scores else "-",
      ]
      rows.append(cells)
    lines += [f"## {figure}", "", markdown_table(rows), ""]
  return "\n".join(lines)


def _draw(figure: str, arms: Mapping[str, list[Measured]], path: pathlib.Path) -> None:
  """Draws the returns (left) and errors (right) of all arms: a bar for the mean, a point for each seed."""
  plt = figures_lib.pyplot(path)
  if plt is None:
    return
  fig, axes = plt.subplots(1, 2, figsize=(10, 0.4 * len(arms) + 1.4), layout="constrained", sharey=True)
  sides = (("mean_return", "mean return"), ("error", "open-loop error (standard deviations)"))
  for ax, (attribute, label) in zip(axes, sides, strict=True):
    for row, (name, runs) in enumerate(arms.items()):
      numbers = [getattr(run, attribute) for run in runs]
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
