"""One update: draw a batch of each of its phases, differentiate the sum of their losses, apply their optimisers."""

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
from jedi_jax.training.order import owned_components
from jedi_jax.training.state import TrainState
from jedi_jax.types import Array, Metrics, Segment, Term

Update = Callable[[TrainState, replay_lib.ReplayState], tuple[TrainState, dict[str, Metrics]]]


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
  # One flat vector: a few large operations instead of some twenty small ones for each of a hundred arrays.
  clip = optax.flatten(optax.clip_by_global_norm(config.max_grad_norm))
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
    optax.flatten(optax.scale_by_adam(b2=config.beta2, eps=config.epsilon)),
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
  phases: Mapping[int, Phase],
  optimizers: Mapping[str, optax.GradientTransformation],
  *,
  batch_size: int,
  age_weights: tuple[float, ...],
  age_groups: str = "episodes",
) -> Update:
  """Builds an update of one phase, or of several that train together, to be called under `parallel.AXIS`.

  Phases that train together have one gradient, that of the sum of their losses. A component that several of them train
  is moved by the optimiser of the first, and the first's `after` applies.

  Every random number derives from the run's key, the phase and the number of updates so far, and each element of the
  batch has its own key. So the draws depend neither on the number of devices nor on interruptions.

  An update whose loss or gradient is not finite is skipped: parameters and optimiser state do not change, 'skipped' is
  1 and all other metrics are 0. It counts as an update, so the next one draws another batch.

  Args:
    phases: the phases by number; the number separates a phase's random numbers from those of others.
    optimizers: by phase, each for the phase's `owned_components`.
    batch_size: segments of the global batch, for phases without a number of their own.
    age_weights: see `replay.sample`.
    age_groups: see `replay.sample`.
  """
  owned = owned_components(phases.values())

  def draw(
    index: int, phase: Phase, state: TrainState, replay: replay_lib.ReplayState
  ) -> tuple[Segment, Array, Array, Array]:
    """Returns the arguments of the phase's losses after the parameters."""
    count = state.updates[phase.name]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), index), count)
    batch_key, shared_key = jax.random.split(key)
    keys = parallel.local_share(jax.random.split(batch_key, phase.batch_size or batch_size))
    *segment_keys, loss_keys = jnp.unstack(
      jax.vmap(lambda key: jax.random.split(key, phase.segments + 1))(keys), axis=1
    )
    segment = replay_lib.sample(
      replay,
      jnp.concatenate(segment_keys),
      length=phase.length,
      age_weights=age_weights,
      age_groups=age_groups,
      beyond_end=phase.beyond_end,
      final_frames=phase.final_frames,
    )
    return segment, loss_keys, shared_key, count

  def update(state: TrainState, replay: replay_lib.ReplayState) -> tuple[TrainState, dict[str, Metrics]]:
    draws = {phase.name: draw(index, phase, state, replay) for index, phase in phases.items()}

    def loss(trained: dict[str, Any]) -> tuple[Array, dict[str, dict[str, Term | Array]]]:
      values, metrics = [], {}
      for phase in phases.values():
        own = {name: trained[name] for name in phase.components}
        losses = phase.losses({**state.params, **own}, *draws[phase.name])
        value, means = weighted_loss(losses.terms)
        named = {f"loss_{name}": mean for name, mean in means.items()}
        metrics[phase.name] = {"loss": value, **named, **losses.metrics}
        values.append(value)
      return sum(values[1:], values[0]), metrics

    trained = {name: state.params[name] for names in owned.values() for name in names}
    gradient, metrics = jax.grad(loss, has_aux=True)(trained)
    parts = {phase: ravel_pytree({name: gradient[name] for name in names}) for phase, names in owned.items()}
    flat = parallel.mean(jnp.concatenate([flat for flat, _ in parts.values()]))  # One all-reduce of one vector.
    reduced = {name: parallel.reduce_metrics(own) for name, own in metrics.items()}
    params, states, start = dict(state.params), {}, 0
    for name, (own, unravel) in parts.items():
      piece = flat[start : start + own.size]
      start += own.size
      before = {component: trained[component] for component in owned[name]}
      steps, states[name] = optimizers[name].update(unravel(piece), state.optimizers[name], before)
      params |= optax.apply_updates(before, steps)
      reduced[name]["grad_norm"] = jnp.linalg.norm(piece)
    first = next(iter(phases.values()))
    params = first.after(params, reduced[first.name])
    # The same on all devices of the run.
    finite = jnp.stack([jnp.isfinite(own[key]) for own in reduced.values() for key in ("loss", "grad_norm")]).all()

    def keep(new: Any, old: Any) -> Any:
      return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

    state = state.replace(
      params=keep(params, state.params),
      optimizers={**state.optimizers, **keep(states, {name: state.optimizers[name] for name in states})},
      updates={**state.updates, **{name: state.updates[name] + 1 for name in states}},
      skipped={**state.skipped, **{name: jnp.where(finite, 0, state.skipped[name] + 1) for name in states}},
    )
    reduced = keep(reduced, jax.tree.map(jnp.zeros_like, reduced))
    return state, {name: {**own, "skipped": 1.0 - finite} for name, own in reduced.items()}

  return update
