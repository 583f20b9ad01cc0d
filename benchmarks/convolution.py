"""Times the lowerings of a 3 x 3 convolution and of its gradients inside a compiled loop.

  python benchmarks/convolution.py
  python benchmarks/convolution.py --runs=2
  python benchmarks/convolution.py --kernel --loop=200

All updates of this library run inside a loop, where XLA's CPU backend computes the gradient of a convolution's kernel
much slower than outside. The table compares the lowerings of `jedi_jax.ops.images.conv3x3`. The result is written to
benchmarks/results/convolution_<platform>.json. With --runs=2 or more, 'matmul' and the lowering of packed runs are
mapped over the kernels of these runs, and the times are those of all of them; that record is
convolution_packed_<platform>.json.

--kernel times the GPU kernel of convolution, group norm and SiLU in bfloat16, by how many input channels it takes at a
time and by Triton's number of stages, beside XLA's convolution. It also times a step of the reward / end model with
XLA's convolutions and group norms, with kernels of our own, and with one kernel of all its residual blocks. The result
is written to benchmarks/results/convolution_kernel_<platform>.json.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import record
from absl import flags

from jedi_jax.errors import UserError
from jedi_jax.models.reward_end import reward_end_model
from jedi_jax.nn import blocks, chain
from jedi_jax.ops import fused_convolution, kernels
from jedi_jax.ops.images import conv3x3, resolve_convolution
from jedi_jax.runs import program
from jedi_jax.types import Compute

_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed calls.", lower_bound=1)
_LOOP = flags.DEFINE_integer("loop", 2, "Iterations of the compiled loop in one call.", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 1, "Packed runs.", lower_bound=1)
_NAME = flags.DEFINE_string("name", None, "Name of the record, instead of one by the platform.")
_KERNEL = flags.DEFINE_bool("kernel", default=False, help="Times the GPU kernel instead.")

# Batch, height = width, input channels, output channels: the first levels of the encoder and of the denoiser.
SHAPES = ((32, 8, 160, 160), (80, 64, 3, 16), (80, 64, 16, 16), (32, 64, 32, 32))


def main() -> None:
  """Runs the benchmark."""
  if _KERNEL.value:
    time_kernel("pallas")
    return
  started = record.machine()
  rows = []
  packed = (_RUNS.value,) if _RUNS.value > 1 else ()
  lowerings = ("matmul", resolve_convolution("auto", packed=True)) if packed else ("lax", "matmul_gradient", "matmul")
  for batch, size, channels_in, channels_out in SHAPES:
    x = jax.random.normal(jax.random.key(0), (*packed, batch, size, size, channels_in))
    kernel = 0.05 * jax.random.normal(jax.random.key(1), (*packed, 3, 3, channels_in, channels_out))
    for lowering in lowerings:
      forward, backward = _programs(lowering, _LOOP.value)
      shape = f"{batch} x {size} x {size} x {channels_in} -> {channels_out}"
      row = {"shape": shape, "runs": _RUNS.value, "lowering": lowering}
      for name, function in (("forward", forward), ("gradient", backward)):
        times = record.seconds(functools.partial(function, x, kernel), repeats=_REPEATS.value)
        row[name] = [t / _LOOP.value for t in times]
      rows.append(row)
  print(record.table(rows, ["shape", "lowering", "forward", "gradient"]))
  name = "convolution_packed" if packed else "convolution"
  path = record.write(_NAME.value or f"{name}_{jax.default_backend()}", rows, started=started)
  print(f"written to {path}")


def _programs(lowering: str, loop: int):
  """Returns compiled loops over the convolution and over its gradients."""

  def convolve(x, kernel):
    mapped = functools.partial(conv3x3, lowering=lowering)
    return (jax.vmap(mapped) if _RUNS.value > 1 else mapped)(x, kernel)

  def loss(x, kernel):
    return jnp.mean(jnp.square(jax.nn.silu(convolve(x, kernel))))

  @jax.jit
  def forward(x, kernel):
    return jax.lax.fori_loop(0, loop, lambda _, k: k + 1e-6 * jnp.mean(convolve(x, k)), kernel)

  @jax.jit
  def backward(x, kernel):
    def body(_, carry):
      gradients = jax.grad(loss, (0, 1))(*carry)
      return carry[0] - gradients[0], carry[1] - gradients[1]

    return jax.lax.fori_loop(0, loop, body, (x, kernel))

  return forward, backward


def time_kernel(mode: str, shapes=((32, 8, 160), (32, 8, 320), (256, 8, 160))) -> None:
  """Times the kernel by its constants; `mode` is 'pallas' or 'interpret', `shapes` are batch, side, input channels."""
  if mode == "pallas" and not kernels.runs_here():
    raise UserError("--kernel needs a CUDA GPU of compute capability 8.0 or newer")
  started, rows, loops = record.machine(), [], []
  for batch, size, channels in shapes:
    row = {"shape": f"{batch} x {size} x {size} x {channels} -> 160"}
    x = jax.random.normal(jax.random.key(0), (batch, size, size, channels), jnp.bfloat16)
    rows.append({**row, "channels": "XLA"})
    loops.append(_kernel_loop(x, mode, fused=False))
    for at_a_time, stages in itertools.product((32, 64), (2, 3, 4, 6)):
      rows.append({**row, "channels": at_a_time, "stages": stages})
      with _constants(at_a_time, stages):
        loops.append(_kernel_loop(x, mode))
  for kind in ("XLA", "several kernels", "one kernel"):
    batch, size, _ = shapes[0]
    rows.append({"shape": f"reward / end model, {batch} x {size} x {size} x 16: {kind}"})
    loops.append(_reward_end_loop(mode, kind, batch, size))
  found = record.in_turn([{"time": loop} for loop in loops], repeats=_REPEATS.value)
  for row, times in zip(rows, found, strict=True):
    row["time"] = [seconds / _LOOP.value for seconds in times["time"]]
  print(record.table(rows, ["shape", "channels", "stages", "time"]))
  path = record.write(_NAME.value or f"convolution_kernel_{jax.default_backend()}", rows, started=started)
  print(f"written to {path}")


@contextlib.contextmanager
def _constants(channels: int, stages: int):
  """Sets the constants of the kernel while it is traced."""
  own = fused_convolution.CHANNELS, fused_convolution.STAGES, fused_convolution.SHARED
  fused_convolution.CHANNELS, fused_convolution.STAGES, fused_convolution.SHARED = channels, stages, 2**18
  try:
    yield
  finally:
    fused_convolution.CHANNELS, fused_convolution.STAGES, fused_convolution.SHARED = own


def _kernel_loop(x, mode: str, *, fused: bool = True):
  """Returns a compiled loop of convolution, norm and SiLU; with XLA's convolution if not fused."""
  channels, outputs = x.shape[-1], 160
  weights = 0.02 * jax.random.normal(jax.random.key(1), (9 * channels, outputs), x.dtype)
  layer = fused_convolution.Convolution(weights, jnp.zeros(outputs, x.dtype))
  affine = jnp.zeros((1, 2 * outputs), x.dtype)
  settings = kernels.GroupNormSettings(
    group=blocks.GROUP_SIZE, epsilon=blocks.GROUP_NORM_EPSILON, offset=1.0, silu=True, kernels=mode
  )

  def convolve(x):
    if fused:
      y = fused_convolution.convolution(x, layer, settings.group, mode, norm=settings, affine=affine)
    else:
      y = kernels.group_norm(conv3x3(x, weights.reshape(3, 3, channels, outputs)) + layer.bias, affine, settings)
    return jnp.concatenate([y] * (channels // outputs), axis=-1)

  loop = jax.jit(lambda x: jax.lax.fori_loop(0, _LOOP.value, lambda _, x: convolve(x), x))
  compiled = loop.lower(x).compile()
  return lambda: jax.block_until_ready(compiled(x))


def _reward_end_loop(mode: str, kind: str, batch: int, size: int):
  """Returns a compiled loop of steps of the paper's reward / end model on latents."""
  compute = Compute(jnp.bfloat16, kernels="xla" if kind == "XLA" else mode, fused_convolution=True)
  model = reward_end_model((size, size, 16), num_actions=4, compute=compute)
  params = model.prepare(model.init(jax.random.key(0)))
  if kind == "several kernels":
    del params[chain.PARAMS]
  latents = jax.random.normal(jax.random.key(1), (batch, 1, size, size, 16))
  actions = jnp.zeros((batch, 1), jnp.int32)

  @jax.jit
  def loop(params, latents, actions, state):
    def step(_, carry):
      latents, state = carry
      reward_logits, _, state = model.predict(params, latents, actions, latents, state)
      return latents + 1e-3 * jnp.mean(reward_logits), state  # The next step cannot begin before.

    return jax.lax.fori_loop(0, _LOOP.value, step, (latents, state))

  arguments = (params, latents, actions, model.initial_state(batch))
  compiled = loop.lower(*arguments).compile()
  return lambda: jax.block_until_ready(compiled(*arguments))


if __name__ == "__main__":
  program.run(main, __doc__ or "")
