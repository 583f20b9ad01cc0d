"""Diagnoses a trained model on new games, and names its weakest part.

  python experiments/diagnose.py --workdir=runs/breakout

Plays the run's environment with its policy, then measures the denoising loss by noise level, the error of open-loop
imagination with the real actions (compared with copying the last latent), the calibration of the sampler, precision and
recall of rewards and ends on real and on imagined latents, the calibration of the critic, and the statistics of the
latents. Prints a summary and writes diagnosis.json and, with matplotlib, diagnosis.png to the workdir. A run on
recorded episodes is measured on those of its data set that are held out, without the critic.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags

import jedi_jax
from jedi_jax.inspection import diagnosis
from jedi_jax.runs import figures as figures_lib
from jedi_jax.runs import program, workdir
from jedi_jax.tables import markdown_table

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which checkpoint of the run.")
_STEPS = flags.DEFINE_integer("steps", 2_000, "Environment steps to record.", lower_bound=1, upper_bound=10**6)
_NUM_ENVS = flags.DEFINE_integer("num_envs", 4, "Environments in parallel.", lower_bound=1, upper_bound=1024)
_DATA = flags.DEFINE_string("data", None, "Directory of the data set of a run on recorded episodes, if it has moved.")
_SEGMENTS = flags.DEFINE_integer("segments", 128, "Segments to imagine, at most.", lower_bound=1, upper_bound=10**5)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of games, actions and noise; independent of training seeds.", lower_bound=0, upper_bound=2**32 - 1
)


def main() -> None:
  """Diagnoses the run, and prints and draws the result."""
  if not _WORKDIR.value:
    raise jedi_jax.UserError("--workdir is missing: name the directory of a run")
  program.enable_compilation_cache()
  figures = diagnosis.diagnose_run(
    _WORKDIR.value,
    checkpoint=_CHECKPOINT.value,
    steps=_STEPS.value,
    num_envs=_NUM_ENVS.value,
    segments=_SEGMENTS.value,
    seed=_SEED.value,
    data=_DATA.value,
  )
  print(_summary(figures))
  _draw(figures, f"{figures['env']}, {figures['variant']}", workdir.locate(_WORKDIR.value) / "diagnosis.png")


def _summary(figures: Mapping[str, Any]) -> str:
  latents, loop_ = (figures[name] for name in ("latents", "open_loop"))
  lines = [
    f"latents: deviation over time {latents['latent_deviation']:.3f}, change in a step {latents['latent_change']:.3f}, "
    f"standard deviation {latents['latent_std']:.3f}, effective rank {latents['latent_rank']:.1f}, "
    f"largest {latents['largest']:.2f}"
  ]
  if "denoising" in figures:
    d = figures["denoising"]
    losses = zip(d["sigma"], d["loss"], d["without_network"], strict=True)
    rows = [["sigma", "denoising loss", "without the network"]]
    lines += ["", markdown_table(rows + [[f"{s:.3g}", f"{a:.4f}", f"{b:.4f}"] for s, a, b in losses])]
  errors = enumerate(zip(loop_["error"], loop_["copying"], strict=True), 1)
  rows = [["step", "open-loop error", "copying"]]
  lines += ["", markdown_table(rows + [[str(i), f"{a:.3f}", f"{b:.3f}"] for i, (a, b) in errors])]
  if "sampler" in figures:
    sampler = figures["sampler"]
    line = f"sampler: calibration {sampler['calibration']:.2f}, error of one step over copying {sampler['error']:.3f}"
    lines += ["", line]
  rows = [["class", "examples", "precision, recall on real latents", "in imagination"]]
  real, imagined = figures["rewards_ends"]["on_real"], figures["rewards_ends"]["in_imagination"]
  for kind, label in (("reward", "-1"), ("reward", "0"), ("reward", "+1"), ("end", "yes")):
    cells = (
      ", ".join("-" if (x := source.get(f"{kind}_{what}_{label}")) is None else f"{x:.2f}" for what in _PAIR)
      for source in (real, imagined)
    )
    rows.append([f"{kind} {label}", f"{real[f'{kind}_count_{label}']:.0f}", *cells])
  lines += ["", markdown_table(rows)]
  if "value" in figures:
    value = figures["value"]
    correlation = "-" if value["correlation"] is None else f"{value['correlation']:.2f}"
    lines += ["", f"value: correlation with the return {correlation}, bias {value['bias']:+.3f}"]
  lines += ["", f"weakest: {figures['weakest']}"]
  return "\n".join(lines)


_PAIR = ("precision", "recall")


def _draw(figures: Mapping[str, Any], title: str, path: pathlib.Path) -> None:
  plt = figures_lib.pyplot(path)
  if plt is None:
    return
  fig, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
  fig.suptitle(title)
  ax = axes[0, 0]
  if "denoising" in figures:
    d = figures["denoising"]
    ax.loglog(d["sigma"], d["loss"], "o-", label="denoiser")
    ax.loglog(d["sigma"], d["without_network"], "--", color="gray", label="without the network")
    ax.legend()
  ax.set(title="denoising loss", xlabel="noise level", ylabel="loss")
  ax = axes[0, 1]
  steps = range(1, len(figures["open_loop"]["error"]) + 1)
  ax.plot(steps, figures["open_loop"]["error"], "o-", label="imagined, real actions")
  ax.plot(steps, figures["open_loop"]["copying"], "--", color="gray", label="copying the last latent")
  ax.set(title="open-loop error", xlabel="step", ylabel="standard deviations of latents", ylim=(0, None))
  ax.legend()
  ax = axes[1, 0]
  bars = [(k, c, p) for k, c in (("reward", "-1"), ("reward", "+1"), ("end", "yes")) for p in _PAIR]
  for offset, (source, label) in enumerate((("on_real", "real latents"), ("in_imagination", "imagination"))):
    got = figures["rewards_ends"][source]
    heights = [got.get(f"{kind}_{what}_{name}", 0.0) for kind, name, what in bars]
    ax.bar([i + 0.4 * offset for i in range(len(bars))], heights, width=0.4, label=label)
  ax.set_xticks([i + 0.2 for i in range(len(bars))], [f"{k} {c}\n{p}" for k, c, p in bars], fontsize=8)
  ax.set(title="rewards and ends", ylim=(0, 1.05))
  ax.legend()
  ax = axes[1, 1]
  if "value" in figures:
    value = figures["value"]
    ax.plot(value["predicted"], value["realised"], "o-")
    ends = [min(value["predicted"] + value["realised"]), max(value["predicted"] + value["realised"])]
    ax.plot(ends, ends, "--", color="gray")
  ax.set(title="value, by fifths of the steps", xlabel="predicted", ylabel="discounted return that followed")
  figures_lib.save(fig, path)


if __name__ == "__main__":
  program.run(main, __doc__ or "")
