"""Compiles the updates for TPUs without a TPU, and reports the compiler's memory analysis and time estimate.

  pip install libtpu
  python benchmarks/tpu_compile.py --slices=v5e:2x2,v5p:2x2x1 --chips=1,4 --variants=jedi,diamond

Nothing is executed. libtpu compiles the programs of training (`pmap` over the devices) for the chips of a named slice;
absent.py describes the programs.

Memory is XLA's `Compiled.memory_analysis` for one chip. The time is not a measurement but the estimate of XLA's cost
model (`optimal_seconds`) for one chip. The cost model counts the body of a loop once, and imagination is a loop, so the
estimate is multiplied by the ratio of the operations in the trace (see flops.py) to those that the model counted.
Without loops this ratio is 1.1, since the trace includes products with padding. Operations unknown to the cost model
seem to count as -1 s; the estimate excludes them, and their number is reported.

Compiling a program takes minutes on a small machine. The record is written after each program, and --add continues an
existing record. The result is written to benchmarks/results/tpu_compile.json.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import absent
import jax
import record
import throughput
from absl import flags
from jax.experimental import topologies

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.errors import UserError
from jedi_jax.runs import program
from jedi_jax.training.parallel import Devices
from jedi_jax.types import EnvSpec

_SLICES = flags.DEFINE_list("slices", ["v5e:2x2"], "libtpu's names of slices, such as v5e:2x2 or v5p:2x2x1.")
_CHIPS = flags.DEFINE_list("chips", ["1"], "Numbers of chips of a slice that share the run.")
_LEVEL = flags.DEFINE_enum(
  "level", "default", ["default", "O0", "O1", "O2", "O3"], "The compiler's effort (jax_optimization_level)."
)
_FLAGS = flags.FLAGS

_NAME = "tpu_compile"
_KEY = ("slice", "chips", "variant", "set", "program", "preset", "batch", "level", "dtype", "env", "slots")
_COLUMNS = [*_KEY[:8], "compile s", "arguments MiB", "working MiB", "output MiB", "TFLOP", "estimate ms"]


def main() -> None:
  """Runs the benchmark."""
  absent.check_programs()
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("libtpu is missing, the compiler for TPUs: pip install libtpu")
  jax.config.update("jax_platforms", "cpu")  # Keeps libtpu from searching for a TPU.
  if _LEVEL.value != "default":
    jax.config.update("jax_optimization_level", _LEVEL.value)
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no metadata server.
  started = {**record.machine(), "libtpu": importlib.metadata.version("libtpu")}
  spec = envs.spec(_FLAGS.env)
  path = record.RESULTS / f"{_NAME}.json"
  rows = json.loads(path.read_text())["rows"] if absent.ADD.value and path.exists() else []
  done = absent.keys(rows, _KEY)
  for name in _SLICES.value:
    chips = _chips(name)
    for text in _CHIPS.value:
      count = int(text) if text.isdigit() else 0
      if not 1 <= count <= len(chips):
        raise UserError(f"--chips: {text!r} is not a number from 1 to {len(chips)}, the chips of {name}")
      devices = Devices(chips[:count])
      devices.check_batch(_FLAGS.batch_size)
      for part in absent.PARTS.value:
        for variant in _FLAGS.variants:
          settings = " ".join(_FLAGS.set)
          key = (name, count, variant, settings, part, _FLAGS.preset, _FLAGS.batch_size, _LEVEL.value)
          key += (_FLAGS.dtype, _FLAGS.env, absent.SLOTS.value)
          if key not in done:
            about = {**dict(zip(_KEY, key, strict=True)), "commit": record.commit()}
            rows.append({**about, **_measure(part, variant, spec, devices)})
            record.write(_NAME, rows, started=started)
            print(record.table(rows[-1:], _COLUMNS), flush=True)
  print(record.table(*compare(rows)))
  print(f"written to {path}")


def _chips(name: str) -> list[jax.Device]:
  try:
    return topologies.get_topology_desc(topology_name=name, platform="tpu").devices
  except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError.
    raise UserError(f"--slices: no slice {name!r}: {str(error).splitlines()[0][:200]}") from None


def _measure(part: str, variant: str, spec: EnvSpec, devices: Devices) -> dict[str, Any]:
  """Compiles one program and returns the compiler's analysis of it."""
  config = config_lib.override(throughput.make_config(variant), {"precision.convolution": "lax"})
  compiled, row = absent.compile_program(part, config, spec, devices)
  costs = compiled.cost_analysis()
  row |= {name: costs.get(name) for name in ("optimal_seconds", "flops", "bytes accessed")}
  if "TFLOP" in row:
    row |= estimate(row["optimal_seconds"], row["flops"], 1e12 * row["TFLOP"])
  return row


def estimate(seconds: float | None, counted: float | None, traced: float) -> dict[str, Any]:
  """Corrects the compiler's time estimate for loops and for unknown operations.

  Args:
    seconds: the compiler's estimate, in which every unknown operation counts as -1.
    counted: operations that the compiler counted.
    traced: operations in the trace.

  Returns:
    'unknown operations' and 'estimate ms'; empty if the compiler gives no estimate.
  """
  if seconds is None or not counted:
    return {}
  unknown = max(math.ceil(-seconds), 0)
  return {"unknown operations": unknown, "estimate ms": 1e3 * (seconds + unknown) * max(traced / counted, 1.0)}


def compare(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
  """Compares the variants by slice, number of chips and program.

  Args:
    rows: rows of the record; missing figures give empty cells.

  Returns:
    One line per slice, number of chips and program; and the columns: working memory of each variant (with its settings,
    if any), working memory of the first variant relative to each other variant, and time estimates.
  """
  rows = [absent.complete(row) for row in rows]
  variants = list(dict.fromkeys(row["variant"] for row in rows))
  arms = sorted({(row["variant"], row["set"]) for row in rows}, key=lambda arm: (variants.index(arm[0]), arm[1]))
  names = {arm: " ".join(arm).strip() for arm in arms}
  differing = (key for key in ("preset", *_KEY[6:]) if len({row[key] for row in rows}) > 1)
  place = ("slice", "chips", "program", *differing)
  programs: dict[tuple[Any, ...], dict[tuple[str, str], dict[str, Any]]] = {}
  for row in sorted(rows, key=lambda row: (row["slice"], row["chips"], absent.PROGRAMS.index(row["program"]))):
    same = tuple(row[key] for key in _KEY if key not in ("variant", "set"))
    programs.setdefault(same, {})[row["variant"], row["set"]] = row
  lines = []
  for found in programs.values():
    line = {key: next(iter(found.values()))[key] for key in place}
    for arm, row in found.items():
      line[f"MiB, {names[arm]}"] = f"{row['working MiB']:,.0f}"
      if "estimate ms" in row:
        line[f"ms, {names[arm]}"] = f"{row['estimate ms']:.1f}"
      if arm[0] != variants[0] and arms[0] in found:
        line[f"of {names[arm]}"] = f"{found[arms[0]]['working MiB'] / row['working MiB']:.2f}"
    lines.append(line)
  shares = [f"of {names[arm]}" for arm in arms if arm[0] != variants[0]]
  return lines, [*place, *(f"MiB, {n}" for n in names.values()), *shares, *(f"ms, {n}" for n in names.values())]


if __name__ == "__main__":
  program.run(main, __doc__ or "")
