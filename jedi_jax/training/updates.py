"""One update of one phase: draw a batch, differentiate the loss, apply the optimiser."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jedi_jax import replay as replay_lib
from jedi_jax.config import Config, OptimizerConfig
from jedi_jax.errors import UserError
from jedi_jax.models.base import Phase
from jedi_jax.training import parallel
from jedi_jax.training.state import TrainState
from jedi_jax.types import Array, Metrics, Term

Update = Callable[[TrainState, replay_lib.ReplayState], tuple[TrainState, Metrics]]


def make_optimizers(config: Config, phases: Sequence[Phase]) -> dict[str, optax.GradientTransformation]:
  """Builds the optimiser of every phase.

  Raises:
    UserError: if a phase has another name than the fields of `config.Updates`.
  """
  factors = {"encoder": config.encoder.learning_rate_factor}
  settings = {
    "denoiser": config.denoiser.optimizer,
    "reward_end": config.reward_end.optimizer,
    "actor_critic": config.actor_critic.optimizer,
    "probe": config.probe.optimizer,
  }
  for phase in phases:
    if phase.name not in settings:
      raise UserError(f"phase {phase.name!r} has no optimizer and no number of updates: name it {', '.join(settings)}")
  return {phase.name: make_optimizer(settings[phase.name], factors, phase.clipped_apart) for phase in phases}


def make_optimizer(
  config: OptimizerConfig, factors: Mapping[str, float], clipped_apart: Collection[str] = ()
) -> optax.GradientTransformation:
  """Builds AdamW with clipping by global norm and warm-up, for parameters by component.

  Args:
    config: its settings.
    factors: factors of the steps of some components; 1 for the others.
    clipped_apart: components whose gradients are clipped by a norm of their own, independent of the others'.
  """
  clip = optax.clip_by_global_norm(config.max_grad_norm)
  if clipped_apart:

    def labels(params: dict[str, Any]) -> dict[str, str]:
      return {name: "apart" if name in clipped_apart else "together" for name in params}

    clip = optax.partition({"apart": clip, "together": clip}, labels)
  schedule: Any = config.learning_rate
  if config.warmup_updates:
    schedule = optax.linear_schedule(0.0, config.learning_rate, config.warmup_updates)

  def scale(updates: dict[str, Any], params: Any) -> dict[str, Any]:
    del params
    return {name: optax.tree_utils.tree_scale(factors.get(name, 1.0), tree) for name, tree in updates.items()}

  return optax.chain(
    clip,
    # One flat vector: a few large operations instead of some twenty small ones for each of a hundred arrays.
    optax.flatten(optax.scale_by_adam(eps=config.epsilon)),
    optax.add_decayed_weights(config.weight_decay, mask=decayed),
    optax.scale_by_learning_rate(schedule),
    optax.stateless(scale),
  )


def decayed(params: Any) -> Any:
  """Marks the parameters that decay: kernels, not biases, gains, embeddings and frequencies."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path[-1:], simple=True).startswith("kernel"), params
  )


def weighted_loss(terms: Mapping[str, Term]) -> tuple[Array, Metrics]:
  """Sums the terms' weighted means over the global batch.

  Returns:
    A scalar whose mean over devices is the loss, and each term's share of it.
  """
  means = {}
  for name, term in terms.items():
    chex.assert_equal_shape([term.values, term.weights])
    chex.assert_type([term.values, term.weights], jnp.float32)
    weight = parallel.mean(jnp.sum(term.weights))
    means[name] = jnp.sum(term.values * term.weights) / jnp.maximum(weight, 1e-8)
  return jnp.sum(jnp.stack(list(means.values()))), means


def make_update(
  phase: Phase,
  index: int,
  optimizer: optax.GradientTransformation,
  *,
  batch_size: int,
  age_weights: tuple[float, ...],
) -> Update:
  """Builds the update of a phase, to be called under `parallel.AXIS`.

  Every random number derives from the run's key, the phase and the number of updates so far, and each element of the
  batch has its own key. So the draws depend neither on the number of devices nor on interruptions.

  An update whose loss or gradient is not finite is skipped: parameters and optimiser state do not change, 'skipped' is
  1 and all other metrics are 0. It counts as an update, so the next one draws another batch.

  Args:
    phase: the phase.
    index: its number; separates its random numbers from those of other phases.
    optimizer: its optimiser.
    batch_size: segments of the global batch.
    age_weights: see `replay.sample`.
  """

  def update(state: TrainState, replay: replay_lib.ReplayState) -> tuple[TrainState, Metrics]:
    count = state.updates[phase.name]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), index), count)
    batch_key, shared_key = jax.random.split(key)
    keys = parallel.local_share(jax.random.split(batch_key, batch_size))
    *segment_keys, loss_keys = jnp.unstack(
      jax.vmap(lambda key: jax.random.split(key, phase.segments + 1))(keys), axis=1
    )
    segment = replay_lib.sample(
      replay,
      jnp.concatenate(segment_keys),
      length=phase.length,
      age_weights=age_weights,
      beyond_end=phase.beyond_end,
      final_frames=phase.final_frames,
    )

    def loss(trained: dict[str, Any]) -> tuple[Array, dict[str, Term | Array]]:
      losses = phase.losses({**state.params, **trained}, segment, loss_keys, shared_key, count)
      value, means = weighted_loss(losses.terms)
      named = {f"loss_{name}": mean for name, mean in means.items()}
      return value, {"loss": value, **named, **losses.metrics}

    trained = {name: state.params[name] for name in phase.components}
    gradient, metrics = jax.grad(loss, has_aux=True)(trained)
    flat, unravel = ravel_pytree(gradient)
    flat = parallel.mean(flat)  # One all-reduce of one vector.
    gradient = unravel(flat)
    steps, optimizer_state = optimizer.update(gradient, state.optimizers[phase.name], trained)
    reduced = parallel.reduce_metrics(metrics)
    reduced["grad_norm"] = jnp.linalg.norm(flat)
    finite = jnp.isfinite(reduced["loss"]) & jnp.isfinite(reduced["grad_norm"])  # The same on all devices of the run.

    def keep(new: Any, old: Any) -> Any:
      return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

    params = phase.after({**state.params, **optax.apply_updates(trained, steps)}, reduced)
    state = state.replace(
      params=keep(params, state.params),
      optimizers={**state.optimizers, phase.name: keep(optimizer_state, state.optimizers[phase.name])},
      updates={**state.updates, phase.name: count + 1},
      skipped={**state.skipped, phase.name: jnp.where(finite, 0, state.skipped[phase.name] + 1)},
    )
    metrics = keep(reduced, jax.tree.map(jnp.zeros_like, reduced))
    return state, {**metrics, "skipped": 1.0 - finite}

  return update
