"""Compiles the programs of training for GPUs without a GPU, and reports launches, memory and an estimate of time.

  pip install 'jax[cuda12]'
  python benchmarks/gpu_compile.py --cards=H100 --variants=jedi,diamond --runs=1,8 --dtypes=bfloat16
  python benchmarks/gpu_compile.py --programs=actor_critic --variants=jedi --by=source

Nothing is executed, and no GPU is needed. absent.py describes the programs. Launches are those of kernels (see hlo.py):
a loop's kernels count as often as the loop runs; a loop whose length is data, such as the epoch's, counts once. The
estimate of time is the sum over kernels of the largest of three: the cost of a launch (--launch_us), the bytes that it
moves over the bandwidth, the operations of its products and convolutions over the peak. It assumes that kernels run one
after the other and reach the data sheet's peaks, so it is a bound from below for large kernels. Without a device
nothing is tuned, and a real card may choose other algorithms; their number changes little.

With --by the twenty parts of a program with the most launches are printed: by kind of kernel, by line of the code
(source), or by module of the networks. The result is written to benchmarks/results/gpu_compile.json.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
from typing import Any

import absent
import hlo
import jax
import record
import throughput
from absl import flags
from jax.experimental import topologies

from jedi_jax import config as config_lib
from jedi_jax import envs, runtime
from jedi_jax.errors import UserError, nearest
from jedi_jax.runs import program
from jedi_jax.training.parallel import Devices


@dataclasses.dataclass(frozen=True)
class Card:
  """A GPU by its data sheet.

  Attributes:
    name: that XLA reports.
    capability: compute capability.
    multiprocessors: number of them.
    lanes: float32 units of a multiprocessor.
    threads: threads of a multiprocessor at most.
    shared: bytes of shared memory of a multiprocessor.
    block_shared: bytes of shared memory of a block at most.
    cache: bytes of the L2 cache.
    memory: bytes.
    bandwidth: bytes a second.
    clock: GHz.
    peaks: operations a second of dense products, by data type of the activations; those of float32 are rounded to
      TF32, JAX's default.
  """

  name: str
  capability: tuple[int, int]
  multiprocessors: int
  lanes: int
  threads: int
  shared: int
  block_shared: int
  cache: int
  memory: int
  bandwidth: float
  clock: float
  peaks: dict[str, float]

  def target(self) -> str:
    """Returns the text form of XLA's GpuTargetConfigProto."""
    major, minor = self.capability
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: {self.shared} shared_memory_per_block_optin: {self.block_shared}
        threads_per_core_limit: {self.threads} core_count: {self.multiprocessors} fpus_per_core: {self.lanes}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.cache} clock_rate_ghz: {self.clock}
        device_memory_size: {self.memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
      }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }}
      runtime_version {{ major: 12 minor: 8 patch: 0 }} device_description_str: "{self.name}"
    """


CARDS = {
  "H100": Card(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    multiprocessors=132,
    lanes=128,
    threads=2048,
    shared=233_472,
    block_shared=232_448,
    cache=50 * 2**20,
    memory=84_929_347_584,
    bandwidth=3.352e12,
    clock=1.98,
    peaks={"bfloat16": 989e12, "float32": 494e12},
  ),
  "A100": Card(
    name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    multiprocessors=108,
    lanes=64,
    threads=2048,
    shared=167_936,
    block_shared=166_912,
    cache=40 * 2**20,
    memory=80 * 2**30,
    bandwidth=2.039e12,
    clock=1.41,
    peaks={"bfloat16": 312e12, "float32": 156e12},
  ),
  "RTX4090": Card(
    name="NVIDIA GeForce RTX 4090",
    capability=(8, 9),
    multiprocessors=128,
    lanes=128,
    threads=1536,
    shared=102_400,
    block_shared=101_376,
    cache=72 * 2**20,
    memory=24 * 2**30,
    bandwidth=1.008e12,
    clock=2.52,
    peaks={"bfloat16": 165e12, "float32": 82.6e12},
  ),
}

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_CARDS = flags.DEFINE_list("cards", ["H100"], f"Cards: {', '.join(CARDS)}.")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16"], "Data types of activations: bfloat16, float32.")
_LAUNCH = flags.DEFINE_float("launch_us", 2.5, "Microseconds that a launch costs at least.", lower_bound=0.0)
_BY = flags.DEFINE_enum("by", None, ["kind", "source", "module"], "Prints the parts with the most launches.")
_TEXT = flags.DEFINE_string("text", None, "Directory that the texts of the compiled programs are written to.")
_RECORD = flags.DEFINE_string("record", "gpu_compile", "Name of the record.")
_FLAGS = flags.FLAGS

_KEY = ("card", "variant", "runs", "dtype", "set", "program", "preset", "batch", "env", "slots")
_COLUMNS = [*_KEY[:6], "launches", "working MiB", "GB", "TFLOP", "estimate ms", "compile s"]


def main() -> None:
  """Runs the benchmark."""
  absent.check_programs()
  for name in _CARDS.value:
    if name not in CARDS:
      raise UserError(f"--cards: no card {name!r}{nearest(name, CARDS)}: {', '.join(CARDS)}")
  for name in _DTYPES.value:
    if name not in CARDS["H100"].peaks:
      raise UserError(f"--dtypes: {name!r} is not bfloat16 or float32")
  plugins = [name for name in _PLUGINS if importlib.util.find_spec(name)]
  if not plugins:
    raise UserError("XLA's compiler for NVIDIA GPUs is missing: pip install 'jax[cuda12]'")
  # No GPU is searched for, and nothing is tuned.
  os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
  # Kernels in graphs would not be counted. On a machine with a GPU the programs' own flags are set already.
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
  runtime.add_flags({"xla_gpu_autotune_level": "0", **runtime.GPU_FLAGS})
  jax.config.update("jax_platforms", "cpu")
  versions = {name: importlib.metadata.version(name) for name in plugins}
  started = {**record.machine(), **versions, "launch_us": _LAUNCH.value}
  path = record.RESULTS / f"{_RECORD.value}.json"
  rows = json.loads(path.read_text())["rows"] if absent.ADD.value and path.exists() else []
  done = absent.keys(rows, _KEY)
  shared = (_FLAGS.preset, _FLAGS.batch_size, _FLAGS.env, absent.SLOTS.value)
  cases = [
    (card, variant, int(runs), dtype, " ".join(_FLAGS.set), part, *shared)
    for card in _CARDS.value
    for part in absent.PARTS.value
    for dtype in _DTYPES.value
    for runs in _FLAGS.runs
    for variant in _FLAGS.variants
  ]
  for case in cases:
    if case not in done:
      about = {**dict(zip(_KEY, case, strict=True)), "commit": record.commit()}
      rows.append({**about, **measure(*case[:4], case[5])})
      record.write(_RECORD.value, rows, started=started)
      print(record.table([_readable(rows[-1])], _COLUMNS), flush=True)
      if _BY.value:
        print(_parts(rows[-1][f"by {_BY.value}"], _BY.value), flush=True)
  print(record.table([_readable(row) for row in rows], _COLUMNS))
  print(f"written to {path}")


def measure(card: str, variant: str, runs: int, dtype: str, part: str) -> dict[str, Any]:
  """Compiles one program and returns what the compiler made of it."""
  sheet = CARDS[card]
  try:
    topology = topologies.get_topology_desc(platform="cuda", target_config=sheet.target(), topology="1x1x1")
  except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError.
    raise UserError(f"XLA does not compile for {card}: {str(error).splitlines()[0][:200]}") from None
  # What 'auto' is on a GPU.
  settings = {"precision.convolution": "pallas", "precision.kernels": "pallas", "encoder.chunk": 0}
  settings = {path: value for path, value in settings.items() if not any(s.startswith(f"{path}=") for s in _FLAGS.set)}
  settings["precision.compute_dtype"] = dtype
  config = config_lib.override(throughput.make_config(variant), settings)
  devices = Devices(topology.devices[:1], runs=runs)
  compiled, row = absent.compile_program(part, config, envs.spec(_FLAGS.env), devices)
  text = compiled.as_text()
  if _TEXT.value:
    os.makedirs(_TEXT.value, exist_ok=True)
    with open(os.path.join(_TEXT.value, f"{card}-{variant}-{runs}-{dtype}-{part}.txt"), "w") as file:
      file.write(text)
  kernels = hlo.read(text)
  sums = hlo.total(kernels)[""]
  time = hlo.seconds(kernels, launch=_LAUNCH.value / 1e6, bandwidth=sheet.bandwidth, peak=sheet.peaks[dtype])
  return {
    **row,
    **sums,
    "estimate ms": 1e3 * time,
    "loops of unknown length": hlo.loops_of_unknown_length(text),
    "by kind": {name: own["launches"] for name, own in hlo.total(kernels, by="kind").items()},
    **{
      f"by {by}": {name: own["launches"] for name, own in list(hlo.total(kernels, by=by).items())[:20]}
      for by in ("source", "module")
    },
  }


def _readable(row: dict[str, Any]) -> dict[str, Any]:
  return {**row, "launches": f"{row['launches']:,}", "GB": row["bytes"] / 1e9, "TFLOP": row["flop"] / 1e12}


def _parts(launches: dict[str, int], by: str) -> str:
  return record.table([{by: name or "(other)", "launches": f"{n:,}"} for name, n in launches.items()], ["launches", by])


if __name__ == "__main__":
  program.run(main, __doc__ or "")
