"""The training state: arrays only, so that it can be donated, vmapped, distributed and saved."""

from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jedi_jax.models.base import Model
from jedi_jax.training.order import group_phases, owned_components
from jedi_jax.types import Array, Params


class TrainState(flax.struct.PyTreeNode):
  """Everything that updates change.

  Attributes:
    params: parameters by component, float32.
    optimizers: optimiser state by phase.
    updates: [] int32 by phase, number of updates, including skipped ones.
    skipped: [] int32 by phase, number of the newest updates in a row that were skipped because their loss or gradient
      was not finite.
    key: [2] uint32, data of the key from which all batches and noise derive; constant.
  """

  params: dict[str, Params]
  optimizers: dict[str, optax.OptState]
  updates: dict[str, Array]
  skipped: dict[str, Array]
  key: Array


def make_init(
  model: Model, optimizers: Mapping[str, optax.GradientTransformation], order: str = "sequential"
) -> Callable[[Array], TrainState]:
  """Returns a pure function from a key to a fresh state; `order` as in `epoch.make_epoch`."""
  updates = [phases for turns in group_phases(model.phases, order).values() for phases in turns]
  owned = {name: components for phases in updates for name, components in owned_components(phases).items()}

  @jax.jit
  def init_optimizers(params: dict[str, Params]) -> dict[str, optax.OptState]:
    return {phase: optimizers[phase].init({name: params[name] for name in names}) for phase, names in owned.items()}

  def init(key: Array) -> TrainState:
    params_key, run_key = jax.random.split(key)
    params = model.init(params_key)
    return TrainState(
      params=params,
      optimizers=init_optimizers(params),
      updates={phase.name: jnp.zeros((), jnp.int32) for phase in model.phases},
      skipped={phase.name: jnp.zeros((), jnp.int32) for phase in model.phases},
      key=jax.random.key_data(run_key),
    )

  return init
