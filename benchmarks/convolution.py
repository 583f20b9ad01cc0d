"""Times the lowerings of a 3 x 3 convolution and of its gradients inside a compiled loop.

  python benchmarks/convolution.py

All updates of this library run inside a loop, where XLA's CPU backend computes the gradient of a convolution's kernel
much slower than outside. The table compares the lowerings of `jedi_jax.ops.images.conv3x3`. The result is written to
benchmarks/results/convolution_<platform>.json.
"""

import functools

import jax
import jax.numpy as jnp
import record
from absl import flags

from jedi_jax.ops.images import conv3x3
from jedi_jax.runs import program

_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed calls.", lower_bound=1)
_LOOP = flags.DEFINE_integer("loop", 2, "Iterations of the compiled loop in one call.", lower_bound=1)

# Batch, height = width, input channels, output channels: the first levels of the encoder and of the denoiser.
SHAPES = ((32, 8, 160, 160), (80, 64, 3, 16), (80, 64, 16, 16), (32, 64, 32, 32))


def main() -> None:
  """Runs the benchmark."""
  started = record.machine()
  rows = []
  for batch, size, channels_in, channels_out in SHAPES:
    x = jax.random.normal(jax.random.key(0), (batch, size, size, channels_in))
    kernel = 0.05 * jax.random.normal(jax.random.key(1), (3, 3, channels_in, channels_out))
    for lowering in ("lax", "matmul_gradient", "matmul"):
      forward, backward = _programs(lowering, _LOOP.value)
      row = {"shape": f"{batch} x {size} x {size} x {channels_in} -> {channels_out}", "lowering": lowering}
      for name, function in (("forward", forward), ("gradient", backward)):
        times = record.seconds(functools.partial(function, x, kernel), repeats=_REPEATS.value)
        row[name] = [t / _LOOP.value for t in times]
      rows.append(row)
  print(record.table(rows, ["shape", "lowering", "forward", "gradient"]))
  path = record.write(f"convolution_{jax.default_backend()}", rows, started=started)
  print(f"written to {path}")


def _programs(lowering: str, loop: int):
  """Returns compiled loops over the convolution and over its gradients."""

  def loss(x, kernel):
    return jnp.mean(jnp.square(jax.nn.silu(conv3x3(x, kernel, lowering=lowering))))

  @jax.jit
  def forward(x, kernel):
    return jax.lax.fori_loop(0, loop, lambda _, k: k + 1e-6 * jnp.mean(conv3x3(x, k, lowering=lowering)), kernel)

  @jax.jit
  def backward(x, kernel):
    def body(_, carry):
      gradients = jax.grad(loss, (0, 1))(*carry)
      return carry[0] - gradients[0], carry[1] - gradients[1]

    return jax.lax.fori_loop(0, loop, body, (x, kernel))

  return forward, backward


if __name__ == "__main__":
  program.run(main, __doc__ or "")
