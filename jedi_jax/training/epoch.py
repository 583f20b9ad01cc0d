"""The epoch: the updates of all phases in one compiled call."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jedi_jax.models.base import Model
from jedi_jax.replay import ReplayState, sample
from jedi_jax.training.order import group_phases
from jedi_jax.training.state import TrainState
from jedi_jax.training.updates import Update, make_update
from jedi_jax.types import Array, Metrics, Params

_PAIRS = 64
"""Pairs of successive frames on which the encoder's movement is measured."""
_PAIRS_KEY = 1_000_000
"""Number that separates their key from those of the phases."""

Epoch = Callable[[TrainState, ReplayState, dict[str, Array]], tuple[TrainState, dict[str, Metrics]]]


def make_epoch(
  model: Model,
  optimizers: Mapping[str, optax.GradientTransformation],
  *,
  order: str = "sequential",
  batch_size: int,
  age_weights: tuple[float, ...],
  age_groups: str = "episodes",
) -> Epoch:
  """Builds the epoch as a pure function, to be called under `parallel.AXIS`.

  Args:
    model: the composed model.
    optimizers: by phase.
    order: see `order.group_phases`. Phases in turns may differ in their numbers of updates; see `_in_turn`.
    batch_size: of the global batch, for phases without one of their own.
    age_weights: see `replay.sample`.
    age_groups: see `replay.sample`.

  Returns:
    (state, replay, number of updates by phase, [] int32) -> (state, sums of each phase's metrics over its updates). The
    phases run in order. The numbers are traced, so one compilation serves the
    long first epoch, the others, and each group by itself. With a learned encoder the denoiser has one more figure,
    'encoder_movement', which belongs to the whole call and to all phases; see `_encoder_movement`.
  """
  numbers = {phase.name: index for index, phase in enumerate(model.phases)}
  # By the first phase of each update, whose number of updates is that of the update.
  groups = [
    {
      phases[0].name: make_update(
        {numbers[phase.name]: phase for phase in phases},
        optimizers,
        batch_size=batch_size,
        age_weights=age_weights,
        age_groups=age_groups,
      )
      for phases in turns
    }
    for turns in group_phases(model.phases, order).values()
  ]

  def epoch(state: TrainState, replay: ReplayState, counts: dict[str, Array]) -> tuple[TrainState, dict[str, Metrics]]:
    before = state.params["encoder"]
    sums: dict[str, Metrics] = {}
    for turns in groups:
      own_counts = {name: counts[name] for name in turns}
      state, own = _in_turn(turns, state, replay, own_counts)
      sums |= own
    if jax.tree.leaves(before) and "denoiser" in sums:
      movement = _encoder_movement(model, before, state, replay)
      sums["denoiser"] = {**sums["denoiser"], "encoder_movement": movement}
    return state, sums

  return epoch


def _in_turn(
  turns: Mapping[str, Update], state: TrainState, replay: ReplayState, counts: Mapping[str, Array]
) -> tuple[TrainState, dict[str, Metrics]]:
  """Runs each update its number of times, in rounds, and adds up the metrics.

  The smallest number is that of the rounds; the others are multiples of it.
  """
  if len(turns) == 1:
    [(name, update)] = turns.items()
    return _repeat(update, state, replay, counts[name])
  rounds = functools.reduce(jnp.minimum, counts.values())

  def update_all(state: TrainState, replay: ReplayState) -> tuple[TrainState, dict[str, Metrics]]:
    metrics: dict[str, Metrics] = {}
    for name, update in turns.items():
      state, own = _repeat(update, state, replay, counts[name] // jnp.maximum(rounds, 1))
      metrics |= own
    return state, metrics

  return _repeat(update_all, state, replay, rounds)


def _encoder_movement(model: Model, before: Params, state: TrainState, replay: ReplayState) -> Array:
  """Measures how far the latents of fixed frames have moved, in units of their change in one step.

  The frames are pairs of successive frames. They derive from the run's key and the replay, so they are the same for all
  devices and for all calls between two collections.

  Args:
    model: the composed model.
    before: the encoder's earlier parameters.
    state: the present state.
    replay: the replay.

  Returns:
    [] float32: root mean square difference between the latents of the present and of the earlier encoder, divided by
    the root mean square change from the first to the second frame of a pair, by the present encoder.
  """
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), _PAIRS_KEY)
  keys = jax.random.split(key, _PAIRS)
  pairs = sample(replay, keys, length=2, age_weights=(1.0,), beyond_end=False, final_frames=True)

  def encode(encoder: Params) -> Array:
    return model.encode({**state.params, "encoder": encoder}, pairs.observations, pairs.mask)

  # One program encodes with both, so that equal parameters give equal latents.
  both = jax.tree.map(lambda *x: jnp.stack(x), before, state.params["encoder"])
  old, new = jax.lax.map(encode, both)
  weights = pairs.mask.astype(jnp.float32)

  def mean_square(x: Array, weights: Array) -> Array:
    return jnp.sum(jnp.mean(jnp.square(x), axis=(-3, -2, -1)) * weights) / jnp.maximum(jnp.sum(weights), 1.0)

  change = mean_square(new[:, 1] - new[:, 0], weights[:, 0] * weights[:, 1])
  return jnp.sqrt(mean_square(new - old, weights) / jnp.maximum(change, 1e-12))


def _repeat(
  update: Update, state: TrainState, replay: ReplayState, count: Array
) -> tuple[TrainState, dict[str, Metrics]]:
  """Runs `update` `count` times and adds up its metrics."""
  update = jax.jit(update, inline=True)  # Traced once for its shapes and for the loop.
  zeros: Any = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(update, state, replay)[1])

  def body(_: Array, carry: tuple[TrainState, dict[str, Metrics]]) -> tuple[TrainState, dict[str, Metrics]]:
    state, sums = carry
    state, metrics = update(state, replay)
    return state, jax.tree.map(jnp.add, sums, metrics)

  return jax.lax.fori_loop(0, count, body, (state, zeros))
