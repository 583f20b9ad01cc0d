"""Profiles our DIAMOND and its PyTorch program on a CPU: time by kind of operation, and time of single convolutions.

  taskset -c 0 python benchmarks/profile_cpu.py --diamond_repo=../diamond --batch_size=4 --frames=3 --repeats=2

Run it on one core, as above: times of operations that run in parallel cannot be added. All times are CPU times of this
process, on which other programs have little influence. One table lists the programs of against_torch.py (see there for
their description and requirements). Both sides are timed in turn without a profiler. A further call under the profiler
of JAX or PyTorch gives the share of each kind of operation in that time:

  convolution   forward, with bias; includes 1 x 1 kernels
  gradient      gradients of convolutions with respect to inputs and kernels
  products      LSTM, attention and linear layers, forward and backward
  rest          group norm, activations, sums, pooling, copies, the optimiser, drawing the batch

XLA fuses operations; a fusion counts as its last operation. The other table lists single 3 x 3 convolutions of these
programs and their gradients. Ours run inside a compiled loop, as in updates; convolution.py compares the lowerings.
Without --diamond_repo only our side is measured. The result is written to benchmarks/results/profile_<platform>.json.
"""

import collections
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import against_torch
import jax
import jax.numpy as jnp
import record
import throughput
from absl import flags

from jedi_jax import envs
from jedi_jax.ops.images import conv3x3, resolve_convolution
from jedi_jax.runs import program

_VARIANT = flags.DEFINE_string("variant", "diamond", "Our variant.")
_PROGRAMS = flags.DEFINE_bool("programs", default=True, help="Also profiles whole programs, which compile for minutes.")
_LOOP = flags.DEFINE_integer("loop", 2, "Iterations of the compiled loop in one call.", lower_bound=1)
_FLAGS = flags.FLAGS

KINDS = ("convolution", "gradient", "products", "rest")
# Batch, height = width, input channels, output channels, stride: of the reward / end model at batch 4, then of the
# denoiser.
SHAPES = (
  (72, 64, 6, 32, 1),
  (72, 64, 32, 32, 1),
  (72, 64, 32, 32, 2),
  (72, 32, 32, 32, 1),
  (4, 64, 64, 64, 1),
  (4, 64, 64, 64, 2),
  (4, 64, 128, 64, 1),
  (4, 8, 64, 64, 1),
)


def main() -> None:
  """Runs the benchmark."""
  started = record.machine()
  threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  started["threads"] = threads
  torch = None
  if _FLAGS.diamond_repo:
    import torch

    torch.set_num_threads(threads)
    started["torch"] = torch.__version__
  shapes = [_convolution(shape, torch) for shape in SHAPES]
  print(record.table(shapes, list(shapes[0])))
  programs = _programs(torch) if _PROGRAMS.value else []
  if programs:
    print(record.table(programs, ["program", "of", "time", *KINDS]))
  path = record.write(_FLAGS.name or f"profile_{jax.default_backend()}", [*programs, *shapes], started=started)
  print(f"written to {path}")


def _programs(torch: Any) -> list[dict[str, Any]]:
  """Times and profiles sampling and each kind of update."""
  spec = envs.spec(_FLAGS.env)
  ours = throughput.Case(throughput.make_config(_VARIANT.value), 1, spec)
  sides: list[tuple[str, Any, Callable[..., Any]]] = [
    (f"ours, {_VARIANT.value}", ours, lambda name, call: _profile_jax(ours.text(name), call))
  ]
  if torch is not None:
    repo = against_torch.repository()
    theirs = against_torch.Diamond(repo, throughput.make_config("diamond"), spec)
    sides.append(("PyTorch DIAMOND", theirs, lambda name, call: _profile_torch(torch, call)))
  calls = [side.calls() for _, side, _ in sides]
  times = record.in_turn(calls, repeats=_FLAGS.repeats, clock=time.process_time)
  rows = []
  for name in calls[0]:
    share = 1 / (_FLAGS.frames if name == "sampling" else _FLAGS.updates)
    for (title, _, profile), call, taken in zip(sides, calls, times, strict=True):
      kinds, operations = profile(name, call[name])
      scale = share * statistics.median(taken[name]) / sum(kinds.values())
      row: dict[str, Any] = {"program": name, "of": title, "time": [share * t for t in taken[name]]}
      row |= {kind: [scale * kinds[kind]] for kind in KINDS}
      row["longest"] = {operation: scale * seconds for operation, seconds in operations.most_common(12)}
      rows.append(row)
  return rows


def _profile_jax(text: str, call: Callable[[], Any]) -> tuple[collections.Counter[str], collections.Counter[str]]:
  """Profiles one call of a program with this HLO text; returns seconds by kind and by operation."""
  definitions = {}
  for line in text.splitlines():
    if found := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*)", line):
      definitions[found[1]] = found[2]
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      call()
    (file,) = pathlib.Path(directory).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
  kinds: collections.Counter[str] = collections.Counter(dict.fromkeys(KINDS, 0.0))
  operations: collections.Counter[str] = collections.Counter()
  for plane in profile.planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get("hlo_op")
        definition = definitions.get(str(name), "")
        # The operations inside these are counted themselves.
        if name is None or re.search(r" (while|call|conditional)\(", definition):
          continue
        found = re.search(r'op_name="([^"]*)"', definition)
        origin = found[1] if found else str(name)
        kinds[_kind_jax(origin)] += event.duration_ns / 1e9
        operations[origin] += event.duration_ns / 1e9
  return kinds, operations


def _kind_jax(origin: str) -> str:
  """Returns the kind of an operation from the path of modules in which it was traced."""
  if re.search(r"/(conv\w*|downsample_\d+|upsample_\d+|skip|qkv|out)/", origin):
    return "gradient" if "transpose(" in origin else "convolution"
  return "products" if re.search(r"lstm|attention|linear|head_|dot_general|embed", origin) else "rest"


def _profile_torch(torch: Any, call: Callable[[], Any]) -> tuple[collections.Counter[str], collections.Counter[str]]:
  """Profiles one call; returns seconds by kind and by operation."""
  with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    call()
  kinds: collections.Counter[str] = collections.Counter(dict.fromkeys(KINDS, 0.0))
  operations: collections.Counter[str] = collections.Counter()
  for event in profile.events():
    names, outer = [], event
    while outer is not None:
      names.append(outer.name)
      outer = outer.cpu_parent
    seconds = event.self_cpu_time_total / 1e6
    kinds[_kind_torch(names)] += seconds
    operations[event.name] += seconds
  return kinds, operations


def _kind_torch(names: list[str]) -> str:
  """Returns the kind of an operation from its name and those of its enclosing operations."""
  for kind, pattern in (
    ("gradient", r"conv\w*_backward|ConvolutionBackward"),
    ("convolution", r"aten::\w*conv"),
    ("products", r"rnn|lstm|aten::\w*(mm|matmul|linear|softmax|attention)|MmBackward|Softmax|Rnn"),
  ):
    if any(re.search(pattern, name) for name in names):
      return kind
  return "rest"


def _convolution(shape: tuple[int, ...], torch: Any) -> dict[str, Any]:
  """Times one convolution and its gradients."""
  batch, size, channels_in, channels_out, stride = shape
  x = jax.random.normal(jax.random.key(0), (batch, size, size, channels_in))
  kernel = 0.05 * jax.random.normal(jax.random.key(1), (3, 3, channels_in, channels_out))
  cotangent = jax.random.normal(jax.random.key(2), (batch, size // stride, size // stride, channels_out))
  row: dict[str, Any] = {
    "convolution": f"{batch} x {size} x {size} x {channels_in} -> {channels_out}" + (", stride 2" * (stride == 2))
  }
  forward, gradient = _loops(resolve_convolution("auto"), stride)
  cases: list[dict[str, Callable[[], Any]]] = [
    {
      "forward": lambda: forward(x, kernel, cotangent).block_until_ready(),
      "gradients": lambda: gradient(x, kernel, cotangent).block_until_ready(),
    }
  ]
  if torch is not None:
    cases.append(_convolution_torch(torch, x, kernel, cotangent, stride))
  times = record.in_turn(cases, repeats=_FLAGS.repeats, clock=time.process_time)
  for name in ("forward", "gradients"):
    for side, taken in zip(("ours", "PyTorch"), times, strict=False):
      row[f"{side}, {name}"] = [t / _LOOP.value for t in taken[name]]
  return row


def _loops(lowering: str, stride: int) -> tuple[Any, Any]:
  """Returns compiled loops over a convolution and over its gradients."""

  def forward(x: Any, kernel: Any, cotangent: Any) -> Any:
    del cotangent
    return jnp.mean(conv3x3(x, kernel, stride=stride, lowering=lowering))

  def gradient(x: Any, kernel: Any, cotangent: Any) -> Any:
    _, back = jax.vjp(lambda *args: conv3x3(*args, stride=stride, lowering=lowering), x, kernel)
    by_input, by_kernel = back(cotangent)
    return jnp.mean(by_input) + by_kernel

  def loop(function: Callable[..., Any]) -> Any:
    def body(x: Any, kernel: Any, cotangent: Any) -> Any:
      return jax.lax.fori_loop(0, _LOOP.value, lambda _, k: k + 1e-6 * function(x, k, cotangent), kernel)

    return jax.jit(body)

  return loop(forward), loop(gradient)


def _convolution_torch(torch: Any, x: Any, kernel: Any, cotangent: Any, stride: int) -> dict[str, Callable[[], Any]]:
  """Returns the same calls in PyTorch, in its layout."""
  x, cotangent = (torch.tensor(jax.device_get(jnp.moveaxis(value, -1, 1))) for value in (x, cotangent))
  kernel = torch.tensor(jax.device_get(kernel.transpose(3, 2, 0, 1)))
  x.requires_grad_()
  kernel.requires_grad_()

  def convolve() -> Any:
    return torch.nn.functional.conv2d(x, kernel, stride=stride, padding=1)

  output = convolve()

  def forward() -> None:
    with torch.no_grad():
      for _ in range(_LOOP.value):
        convolve()

  def gradient() -> None:
    for _ in range(_LOOP.value):
      torch.autograd.grad(output, (x, kernel), cotangent, retain_graph=True)

  return {"forward": forward, "gradients": gradient}


if __name__ == "__main__":
  program.run(main, __doc__ or "")
