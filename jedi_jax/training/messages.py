"""The lines that training prints."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jedi_jax.datasets import Dataset
from jedi_jax.models.build import count_parameters
from jedi_jax.training.learner import Learner
from jedi_jax.training.run import Run


def header(runs: Sequence[Run], learner: Learner) -> list[str]:
  """Describes the runs and their model."""
  c, devices = runs[0].config, learner.devices
  what = f"{c.env.name}, variant {c.variant}, preset {c.preset}, seed {c.seed}"
  if devices.packed:
    games = dict.fromkeys(run.config.env.name for run in runs)
    what = f"{len(runs)} runs of {', '.join(games)}, variant {c.variant}, preset {c.preset}"
  where = os.path.commonpath([run.workdir.path for run in runs]) if devices.packed else runs[0].workdir.path
  copies = max(devices.count, devices.runs)
  counts = {name: count // copies for name, count in count_parameters(learner.state.params).items()}
  shares = ", ".join(f"{name} {count:,}" for name, count in counts.items())
  recorded = [] if runs[0].data is None else data(runs[0].data, learner)
  return [
    f"{what}, {devices.count} {devices.devices[0].platform} device(s), in {where}",
    f"parameters: {shares}, in all {sum(counts.values()):,}; latent {learner.model.latent_shape}",
    *recorded,
  ]


def done(run: Run, result: Mapping[str, Any]) -> str:
  """Describes the contents of a run's result.json."""
  parts = [f"{result['seconds']:.0f} s; {run.workdir.result}"]
  if run.data is None:
    if (score := result["human_normalized_score"]) is not None:
      parts.insert(0, f"human-normalised score {score:.3f}")
    parts.insert(0, f"mean return {result['mean_return']:.2f} over {len(result['episode_returns'])} games")
  return "done: " + ", ".join(parts)


def data(data: Dataset, learner: Learner) -> list[str]:
  """Describes the recorded episodes that runs train on, and warns if replay cannot hold them."""
  lines = [
    f"data: {data.path}, {len(data.training):,} episodes of {data.steps:,} steps to train on, "
    f"{len(data.held_out):,} held out"
  ]
  slots = learner.shapes[1].actions.shape[1]
  if data.frames > slots:
    lines.append(
      f"WARNING: the data have {data.frames:,} frames and replay holds {slots:,}: the first "
      f"{data.frames - slots:,} are not trained on; set replay.capacity={data.frames} or leave it out"
    )
  return lines


def epoch(runs: Sequence[Run], values: Sequence[Mapping[str, Any]]) -> str:
  """Describes an epoch; with several runs, by the means of their metrics."""
  p = runs[0].progress
  total = max(run.progress.total_epochs for run in runs)
  steps, frames = (sum(one[name] for one in values) for name in ("env_steps", "frames"))
  parts = [f"epoch {p.epoch}/{total}", f"{steps:,} steps ({frames:,} frames)"]
  if len(runs) > 1:
    parts.insert(1, f"{len(runs)} runs")
  for label, name in (
    ("return", "collect/return"),
    ("evaluated", "evaluation/return"),
    ("denoiser", "denoiser/loss"),
    ("reward/end", "reward_end/loss"),
    ("imagined return", "actor_critic/imagined_return"),
    ("entropy", "actor_critic/policy_entropy"),
  ):
    found = [one[name] for one in values if name in one]
    if found:
      parts.append(f"{label} {np.mean(found):.3g}")
  parts.append(f"{values[0]['time/updates_per_second'] * len(runs):.1f} updates/s")
  if p.epoch > 1:
    parts.append(f"{(total - p.epoch) * values[0]['time/epoch_seconds'] / 60:.0f} min left")
  return ", ".join(parts)


def collapse(run: Run, values: Mapping[str, Any], *, packed: bool) -> str:
  """Reports that the latents of a run have collapsed or recovered."""
  what = "WARNING: the latents have collapsed" if run.collapsed else "the latents have recovered"
  deviation, rank = values["denoiser/latent_deviation"], values["denoiser/latent_rank"]
  return f"{_place(run, packed=packed)}{what}: deviation over time {deviation:.3g}, effective rank {rank:.3g}"


def runaway(run: Run, values: Mapping[str, Any], *, packed: bool) -> str:
  """Reports that the encoder of a run moves faster than the game."""
  c = run.config
  return (
    f"{_place(run, packed=packed)}WARNING: the latents move faster than the game: in one epoch by "
    f"{values['denoiser/encoder_movement']:.3g} times their change in one step "
    f"(training.runaway_movement={c.training.runaway_movement:g}); "
    f"lower encoder.learning_rate_factor={c.encoder.learning_rate_factor:g}"
  )


def new_games(run: Run, *, packed: bool) -> str:
  """Reports that the games of a resumed run could not be continued."""
  return (
    f"{_place(run, packed=packed)}WARNING: {run.config.env.name} does not repeat its steps: new games begin, and the "
    "run is not the one that it would have been without the interruption"
  )


def _place(run: Run, *, packed: bool) -> str:
  """Names one of several runs."""
  return f"{run.workdir.path}: " if packed else ""


def not_finite(run: Run, phases: Sequence[str], count: int) -> str:
  """Explains why a run cannot continue after `count` skipped updates of each of the phases."""
  saved = "no checkpoint" if run.saved is None else f"checkpoint {run.saved}"
  return (
    f"{run.workdir.path}: the loss or gradient of {' or '.join(phases)} was not finite in {count} updates in a row, "
    f"in epoch {run.progress.epoch + 1}; {saved} was saved before: the same command tries again from there; else start "
    "over (--overwrite) with a lower learning_rate or max_grad_norm of "
    f"{' and '.join(f'{phase}.optimizer' for phase in phases)}"
  )
