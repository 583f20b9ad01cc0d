"""Reports the device memory of a run of each variant: state, replay, and working memory of an epoch.

  python benchmarks/memory.py --variants=jedi,diamond --preset=paper --batch_size=32

The figures are the sizes of the arrays and XLA's memory analysis of the compiled epoch (`Compiled.memory_analysis`);
nothing is executed. They hold for the current backend, since backends differ in fusion and in reuse of buffers. On
backends that report their peak memory (GPU, TPU), --measure runs one update of each phase in this process, for a single
variant, and adds the peak. The result is written to benchmarks/results/memory_<platform>.json.
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

_MEASURE = flags.DEFINE_bool(
  "measure", default=False, help="Also runs one update of each phase and reports the device's peak memory."
)
_FLAGS = flags.FLAGS


def main() -> None:
  """Runs the benchmark."""
  started = record.machine()
  variants = _FLAGS.variants
  if _MEASURE.value and len(variants) > 1:
    raise UserError("--measure takes one variant, since the peak is that of the process: set --variants to one")
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
      if peak := (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
        row["peak MiB"] = peak / 2**20
    rows.append(row)
  print(record.table(rows, list(rows[0])))
  for row in rows[1:]:
    saved = 1 - rows[0]["without replay MiB"] / row["without replay MiB"]
    print(f"{rows[0]['variant']} needs {100 * saved:.0f} % less than {row['variant']}, without replay")
  print(f"written to {record.write(_FLAGS.name or f'memory_{jax.default_backend()}', rows, started=started)}")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
