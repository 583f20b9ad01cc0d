"""The epoch: the updates of all phases in one compiled call."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jedi_jax.models.base import Model
from jedi_jax.replay import ReplayState
from jedi_jax.training.state import TrainState
from jedi_jax.training.updates import Update, make_update
from jedi_jax.types import Array, Metrics

Epoch = Callable[[TrainState, ReplayState, dict[str, Array]], tuple[TrainState, dict[str, Metrics]]]


def make_epoch(
  model: Model,
  optimizers: Mapping[str, optax.GradientTransformation],
  *,
  batch_size: int,
  age_weights: tuple[float, ...],
) -> Epoch:
  """Builds the epoch as a pure function, to be called under `parallel.AXIS`.

  Args:
    model: the composed model.
    optimizers: by phase.
    batch_size: of the global batch.
    age_weights: see `replay.sample`.

  Returns:
    (state, replay, number of updates by phase, [] int32) -> (state, sums of each phase's metrics over its updates). The
    phases run in order. The numbers are traced, so one compilation serves the long first epoch, the others, and each
    phase by itself.
  """
  updates = {
    phase.name: make_update(phase, index, optimizers[phase.name], batch_size=batch_size, age_weights=age_weights)
    for index, phase in enumerate(model.phases)
  }

  def epoch(state: TrainState, replay: ReplayState, counts: dict[str, Array]) -> tuple[TrainState, dict[str, Metrics]]:
    sums = {}
    for name, update in updates.items():
      state, sums[name] = _repeat(update, state, replay, counts[name])
    return state, sums

  return epoch


def _repeat(update: Update, state: TrainState, replay: ReplayState, count: Array) -> tuple[TrainState, Metrics]:
  """Runs `update` `count` times and adds up its metrics."""
  update = jax.jit(update, inline=True)  # Traced once for its shapes and for the loop.
  zeros: Any = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(update, state, replay)[1])

  def body(_: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
    state, sums = carry
    state, metrics = update(state, replay)
    return state, jax.tree.map(jnp.add, sums, metrics)

  return jax.lax.fori_loop(0, count, body, (state, zeros))
