"""Weighs a run of each variant: replay, parameters and optimisers, and what an epoch needs besides.

  python benchmarks/memory.py --variants=jedi,diamond --preset=paper --batch_size=32

The figures are XLA's own account of the compiled epoch (`Compiled.memory_analysis`) and the sizes of the arrays;
nothing is run. They are those of the backend that compiles: another one fuses and reuses otherwise. Where the backend
tells its peak (GPU, TPU), --measure runs one update of every phase in this process, for a single variant, and adds it.
Written to benchmarks/results/memory_<platform>.json.
"""

from typing import Any

import jax
import record
import throughput
from absl import flags

from jedi_jax import envs
from jedi_jax.errors import UserError
from jedi_jax.runs import program
from jedi_jax.training import memory

_MEASURE = flags.DEFINE_bool("measure", False, "Also runs one update of every phase and reads the device's peak.")
_FLAGS = flags.FLAGS


def main() -> None:
  """Weighs and writes."""
  started = record.machine()
  variants = _FLAGS.variants
  if _MEASURE.value and len(variants) > 1:
    raise UserError("--measure takes one variant: the peak is that of the process")
  spec = envs.spec(_FLAGS.env)
  rows: list[dict[str, Any]] = []
  for variant in variants:
    config = throughput.make_config(variant)
    found = memory.measure(config, spec)
    row: dict[str, Any] = {"variant": variant, "batch": _FLAGS.batch_size}
    for name in ("state", "working", "replay"):
      row[f"{name} MiB"] = getattr(found, name) / 2**20
    row["without replay MiB"] = row["state MiB"] + row["working MiB"]
    if _MEASURE.value:
      case = throughput.Case(config, 1, spec)
      case.run(**dict.fromkeys(throughput.PHASES, 1))
      stats = jax.local_devices()[0].memory_stats() or {}
      row["peak MiB"] = stats.get("peak_bytes_in_use", 0) / 2**20
    rows.append(row)
  print(record.table(rows, list(rows[0])))
  for row in rows[1:]:
    saved = 1 - rows[0]["without replay MiB"] / row["without replay MiB"]
    print(f"{rows[0]['variant']} needs {100 * saved:.0f} % less than {row['variant']}, replay apart")
  print(f"written to {record.write(_FLAGS.name or f'memory_{jax.default_backend()}', rows, started=started)}")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
