"""Compares optimised pieces of the updates with their straightforward forms.

  python benchmarks/hot_path.py --preset=paper --batch_size=8

The pieces come from the updates of variant `jedi`. Both forms of a piece are checked for equal results and then timed
in turn. For settings of a run (`precision.compute_dtype`, `precision.convolution`, `actor_critic.unroll`), use
throughput.py with --dtype or --set. The result is written to benchmarks/results/hot_path_<platform>.json.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import flops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import throughput
from absl import flags

from jedi_jax import envs
from jedi_jax.config import Config
from jedi_jax.models import imagination
from jedi_jax.models.base import Model
from jedi_jax.models.build import build
from jedi_jax.nn import blocks
from jedi_jax.nn.lstm import Lstm, zero_lstm_state
from jedi_jax.ops import sampler
from jedi_jax.runs import program

_FLAGS = flags.FLAGS


class Piece(NamedTuple):
  """One piece in two forms: functions of the same arguments. If `same`, their results are equal up to rounding."""

  name: str
  plain: Callable[..., Any]
  ours: Callable[..., Any]
  args: tuple[Any, ...]
  same: bool = True


def main() -> None:
  """Runs the benchmark."""
  started = record.machine()
  spec = envs.spec(_FLAGS.env)
  config = throughput.make_config("jedi")
  model = build(config, spec)
  params = model.init(jax.random.key(0))
  pieces = [
    _lstm(params, config),
    _encoder(model, params, config),
    _noise(model, config),
    _sampler(model, params, config),
    _adam(params),
  ]
  rows = []
  for piece in pieces:
    plain, ours = (jax.jit(form) for form in (piece.plain, piece.ours))
    results = plain(*piece.args), ours(*piece.args)
    if piece.same:
      _check(piece.name, *results)
    calls = [
      {piece.name: lambda form=form, args=piece.args: jax.block_until_ready(form(*args))} for form in (plain, ours)
    ]
    times = [taken[piece.name] for taken in record.in_turn(calls, repeats=_FLAGS.repeats)]
    gain = statistics.median(times[0]) / statistics.median(times[1])
    work = [flops.count(form, *piece.args) / 1e9 for form in (piece.plain, piece.ours)]
    rows.append(
      {
        "piece": piece.name,
        "plain": times[0],
        "ours": times[1],
        "times faster": gain,
        "plain GFLOP": work[0],
        "ours GFLOP": work[1],
      }
    )
  print(record.table(rows, list(rows[0])))
  print(f"written to {record.write(f'hot_path_{jax.default_backend()}', rows, started=started)}")


def _check(name: str, plain: Any, ours: Any) -> None:
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(ours), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3, err_msg=name)


def _lstm(params: Any, config: Config) -> Piece:
  """Gradient of the reward / end model's LSTM over a segment."""
  own = params["reward_end"]["lstm"]
  width, batch = config.reward_end.lstm_width, _FLAGS.batch_size
  network = Lstm(width)
  steps = config.denoiser.conditioning_frames + config.actor_critic.horizon - 1
  inputs = jax.random.normal(jax.random.key(1), (batch, steps, own["kernel_ih"].shape[0]))
  state = zero_lstm_state(batch, width)

  def step_by_step(own: Any, inputs: Any) -> Any:
    def step(state: Any, x: Any) -> Any:
      hidden, state = blocks.apply(network, own, x[:, None], state)
      return state, hidden[:, 0]

    return jnp.moveaxis(jax.lax.scan(step, state, jnp.moveaxis(inputs, 1, 0))[1], 0, 1)

  def hoisted(own: Any, inputs: Any) -> Any:
    return blocks.apply(network, own, inputs, state)[0]

  def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(lambda own, inputs: jnp.mean(jnp.square(function(own, inputs))), argnums=(0, 1))

  return Piece("LSTM: input products outside the scan", gradient(step_by_step), gradient(hoisted), (own, inputs))


def _encoder(model: Model, params: Any, config: Config) -> Piece:
  """Gradient of the encoder through the conditioning latents of one denoiser update."""
  length, targets, batch = config.denoiser.conditioning_frames, config.denoiser.targets, _FLAGS.batch_size
  frames = jax.random.randint(
    jax.random.key(2), (batch, length + targets - 1, *model.spec.observation_shape), 0, 256
  ).astype(jnp.uint8)

  def windows(x: Any) -> Any:
    return jnp.concatenate([x[:, i : i + length] for i in range(targets)], axis=1)

  def encode(encoder: Any, frames: Any) -> Any:
    return model.encode({"encoder": encoder}, frames, jnp.ones(frames.shape[:2], bool))

  def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(lambda encoder, frames: jnp.mean(jnp.square(function(encoder, frames))))

  return Piece(
    "encoder: once per frame, not once per use",
    gradient(lambda encoder, frames: encode(encoder, windows(frames))),
    gradient(lambda encoder, frames: windows(encode(encoder, frames))),
    (params["encoder"], frames),
  )


def _noise(model: Model, config: Config) -> Piece:
  """Drawing all random numbers of an imagined trajectory."""
  horizon = config.actor_critic.horizon
  keys = jax.random.split(jax.random.key(3), _FLAGS.batch_size)

  def draw(keys: Any, steps: int) -> Any:
    return imagination.draw_noise(model.dynamics, keys, horizon=steps, num_actions=model.spec.num_actions)

  def total(noise: Any) -> Any:
    return sum(jnp.mean(x) for x in jax.tree.leaves(noise))

  def step_by_step(keys: Any) -> Any:
    def step(sum_: Any, i: Any) -> Any:
      return sum_ + total(draw(jax.vmap(lambda key: jax.random.fold_in(key, i))(keys), 1)), None

    return jax.lax.scan(step, 0.0, jnp.arange(horizon))[0]

  return Piece(
    "noise: drawn before the scan", step_by_step, lambda keys: total(draw(keys, horizon)), (keys,), same=False
  )


def _sampler(model: Model, params: Any, config: Config) -> Piece:
  """Sampling of one imagined frame."""
  batch, length = _FLAGS.batch_size, config.denoiser.conditioning_frames
  past = jax.random.normal(jax.random.key(4), (batch, length, *model.latent_shape))
  noise = jax.tree.map(lambda x: x[0], model.dynamics.sample_noise(jax.random.split(jax.random.key(5), batch), 1))
  actions = jnp.zeros((batch, length), jnp.int32)

  def unrolled(denoiser: Any, past: Any) -> Any:
    return model.dynamics.sample(denoiser, past, actions, noise)

  def looped(denoiser: Any, past: Any) -> Any:
    with mock.patch.object(sampler, "sample", _euler_loop):
      return unrolled(denoiser, past)

  return Piece("sampler: steps unrolled", looped, unrolled, (params["denoiser"], past))


def _euler_loop(denoise: Callable[[Any, Any], Any], noise: Any, sigmas: Any, **unused: Any) -> Any:
  """Euler's method as a compiled loop without churn; replaces `sampler.sample`."""
  del unused

  def step(x: Any, levels: Any) -> Any:
    sigma, following = levels
    estimate = denoise(x, jnp.full((x.shape[0],), sigma))
    return x + (x - estimate) / sigma * (following - sigma), None

  return jax.lax.scan(step, noise, (jnp.asarray(sigmas[:-1]), jnp.asarray(sigmas[1:])))[0]


def _adam(params: Any) -> Piece:
  """The optimiser's step for denoiser and encoder."""
  trained = {name: params[name] for name in ("encoder", "denoiser")}
  gradient = jax.tree.map(jnp.ones_like, trained)
  forms = optax.scale_by_adam(), optax.flatten(optax.scale_by_adam())
  states = tuple(form.init(trained) for form in forms)  # Read and written, as in training.

  def step(index: int) -> Callable[..., Any]:
    return lambda gradient, states: forms[index].update(gradient, states[index], trained)

  count = len(jax.tree.leaves(trained))
  size = sum(math.prod(x.shape) for x in jax.tree.leaves(trained))
  name = f"Adam: one vector of {size:,} instead of {count} arrays"
  return Piece(name, step(0), step(1), (gradient, states), same=False)


if __name__ == "__main__":
  program.run(main, __doc__ or "")
