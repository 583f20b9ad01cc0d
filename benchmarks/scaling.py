"""Times updates over batch size, horizon, conditioning frames, number of packed runs, and size of the replay.

  python benchmarks/scaling.py --preset=small --variants=jedi --figure=scaling.png

Each sweep changes one of them and leaves the others at the preset's values; all values are timed in turn. The exponent
of a curve is the least-squares slope of log seconds (or of log FLOP in the trace, see flops.py) over log value: 1 for
proportional, 0 for constant. For packed runs the time is that of one call for all runs, so that an exponent below 1 is
a gain. The result is written to benchmarks/results/scaling_<platform>.json.
"""

import functools
import itertools
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import record
import throughput
from absl import flags

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.errors import UserError
from jedi_jax.runs import figures, program
from jedi_jax.types import EnvSpec

_SWEEPS = {
  "batch_size": flags.DEFINE_list("batch_sizes", ["4", "8", "16", "32"], "Batch sizes; empty for no sweep."),
  "horizon": flags.DEFINE_list("horizons", ["5", "10", "20"], "Imagined steps."),
  "conditioning": flags.DEFINE_list("conditioning", ["1", "2", "4", "8"], "Conditioning frames L."),
  "runs": flags.DEFINE_list("packed", ["1", "2", "4"], "Packed runs on one device."),
  "replay": flags.DEFINE_list("replays", ["500", "2000", "8000", "32000"], "Capacities of the replay in frames."),
}
_SETTINGS = {
  "batch_size": "training.batch_size",
  "horizon": "actor_critic.horizon",
  "conditioning": "denoiser.conditioning_frames",
}
"""The setting that each sweep changes; the other sweeps change no setting."""
_LEAST = {"replay": 100}
_FIGURE = flags.DEFINE_string("figure", None, "PNG file for a figure of the curves.")
_FLAGS = flags.FLAGS
_FLAGS.set_default("preset", "small")
_FLAGS.set_default("variants", ["jedi"])
_FLAGS.set_default("batch_size", 16)
_FLAGS.set_default("updates", 2)
_FLAGS.set_default("repeats", 5)


def main() -> None:
  """Runs the benchmark."""
  started = record.machine()
  sweeps = {name: _values(name) for name, flag in _SWEEPS.items() if flag.value}
  if not sweeps:
    raise UserError(
      "nothing is swept: give at least one of " + ", ".join(f"--{flag.name}" for flag in _SWEEPS.values())
    )
  spec = envs.spec(_FLAGS.env)
  rows = []
  for variant in _FLAGS.variants:
    base = throughput.make_config(variant)
    own = functools.cache(lambda base=base: throughput.Case(base, 1, spec, slots=throughput.SLOTS))
    for name, values in sweeps.items():
      rows.append({"variant": variant, "sweep": name, "values": values, **_sweep(name, values, base, spec, own)})
      # Each compiled CPU program uses thousands of memory maps; Linux limits their number per process.
      jax.clear_caches()
  print(record.table(*_tabulate(rows)))
  path = record.write(_FLAGS.name or f"scaling_{jax.default_backend()}", rows, started=started)
  print(f"written to {path}")
  if _FIGURE.value:
    _draw(rows, pathlib.Path(_FIGURE.value))


def _sweep(
  name: str, values: Sequence[int], base: config_lib.Config, spec: EnvSpec, own: Callable[[], throughput.Case]
) -> dict[str, Any]:
  """Times one sweep; `own` returns the point of the unchanged preset, which most sweeps contain and share."""
  points = []
  for value in values:
    config = config_lib.override(base, {_SETTINGS[name]: value}) if name in _SETTINGS else base
    runs, slots = value if name == "runs" else 1, value if name == "replay" else throughput.SLOTS
    unchanged = (config, runs, slots) == (base, 1, throughput.SLOTS)
    points.append(own() if unchanged else throughput.Case(config, runs, spec, slots=slots))
  calls = [{phase: point.calls()[phase] for phase in throughput.PHASES} for point in points]
  return _curves(values, points, record.in_turn(calls, repeats=_FLAGS.repeats))


def _values(sweep: str) -> list[int]:
  flag = _SWEEPS[sweep]
  try:
    values = [int(text) for text in flag.value]
  except ValueError:
    raise UserError(f"--{flag.name}={','.join(flag.value)} is not a list of integers") from None
  least = _LEAST.get(sweep, 1)
  if min(values) < least:
    raise UserError(f"--{flag.name}: {min(values)} is too small; it must be at least {least}")
  return values


def _curves(
  values: Sequence[int], points: Sequence[throughput.Case], times: Sequence[dict[str, list[float]]]
) -> dict[str, Any]:
  """Returns seconds of each repetition and FLOP of each point, by phase and for the triple; and their exponents."""
  seconds = {name: [[t / _FLAGS.updates for t in taken[name]] for taken in times] for name in throughput.PHASES}
  flop = {name: [point.runs * point.flop[name] for point in points] for name in throughput.PHASES}
  together = zip(*seconds.values(), strict=True)
  seconds["triple"] = [[sum(parts) for parts in zip(*each, strict=True)] for each in together]
  flop["triple"] = [sum(parts) for parts in zip(*flop.values(), strict=True)]
  medians = {name: [statistics.median(each) for each in curve] for name, curve in seconds.items()}
  return {
    "seconds": seconds,
    "flop": flop,
    "exponents": {name: exponent(values, curve) for name, curve in medians.items()},
    "flop_exponents": {name: exponent(values, curve) for name, curve in flop.items()},
  }


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
  """Returns the least-squares slope of log y over log x; None for fewer than two different values."""
  if len(set(xs)) < 2:
    return None
  return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def _tabulate(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
  """Returns one line per point, followed by the exponents of the sweep with those of FLOP in brackets."""
  lines: list[dict[str, Any]] = []
  for row in rows:
    about = {"variant": row["variant"], "sweep": row["sweep"]}
    for i, value in enumerate(row["values"]):
      lines.append({**about, "value": value, **{name: curve[i] for name, curve in row["seconds"].items()}})
    slopes = {name: (slope, row["flop_exponents"][name]) for name, slope in row["exponents"].items()}
    if slopes["triple"][0] is not None:
      texts = {name: f"{slope:.2f} ({counted:.2f})" for name, (slope, counted) in slopes.items()}
      lines.append({**about, "value": "exponent (of FLOP)", **texts})
  return lines, ["variant", "sweep", "value", *rows[0]["seconds"]]


def _draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws one panel per sweep with the curves of the phases and their exponents; line styles denote variants."""
  plt = figures.pyplot(path)
  if plt is None:
    return
  sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
  styles = dict(zip(dict.fromkeys(row["variant"] for row in rows), itertools.cycle(("-", "--", ":")), strict=False))
  figure, axes = plt.subplots(1, len(sweeps), figsize=(3.4 * len(sweeps), 3.6), layout="constrained", squeeze=False)
  for ax, sweep in zip(axes[0], sweeps, strict=True):
    for row in (row for row in rows if row["sweep"] == sweep):
      for i, (name, curve) in enumerate(row["seconds"].items()):
        slope = row["exponents"][name]
        label = f"{row['variant']} {name}" + ("" if slope is None else f" {slope:.2f}")
        milliseconds = [1e3 * statistics.median(each) for each in curve]
        ax.loglog(row["values"], milliseconds, f"C{i}{styles[row['variant']]}", marker=".", label=label)
      ax.set_xticks(row["values"], list(map(str, row["values"])), minor=False)
    ax.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(plt.ScalarFormatter())
    ax.minorticks_off()
    ax.set(xlabel=sweep, ylabel="milliseconds an update" if ax is axes[0, 0] else "")
    ax.legend(fontsize=6)
  figures.save(figure, path)


if __name__ == "__main__":
  program.run(main, __doc__ or "")
