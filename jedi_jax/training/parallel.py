"""Devices: the only place that knows how many there are.

`jax.pmap` is in maintenance mode; all of its uses are here. A distributed array has a leading axis over devices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.errors import UserError
from jedi_jax.types import Array, Term

AXIS = "devices"


class Devices:
  """The local devices of a run.

  Args:
    devices: which ones; all local devices if None.
  """

  def __init__(self, devices: Sequence[jax.Device] | None = None):
    self.devices = tuple(jax.local_devices() if devices is None else devices)

  @classmethod
  def take(cls, count: int) -> "Devices":
    """The first `count` local devices, all of them for 0.

    Raises:
      UserError: if there are fewer.
    """
    available = jax.local_devices()
    if not 0 <= count <= len(available):
      raise UserError(
        f"{count} devices are asked for and {len(available)} are here: take --devices=0 (all) to {len(available)}"
      )
    return cls(available[:count] if count else None)

  @property
  def count(self) -> int:
    """Number of devices."""
    return len(self.devices)

  def check_batch(self, batch_size: int) -> None:
    """Refuses a global batch that the devices cannot share equally.

    Raises:
      UserError: if the batch size is no multiple of the number of devices.
    """
    if batch_size % self.count:
      raise UserError(
        f"training.batch_size={batch_size} is not divisible by {self.count} devices: "
        f"take a multiple of {self.count}, or fewer devices (--devices)"
      )

  def replicate(self, tree: Any) -> Any:
    """Copies every array to every device; leaves gain a leading axis over devices."""
    mesh = jax.sharding.Mesh(np.asarray(self.devices), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))

    def put(x: Any) -> Array:
      x = np.asarray(x)
      # One shard a device, each a copy of its own: leaves that alias could not be donated.
      shards = [jax.device_put(x[None].copy(), device) for device in self.devices]
      return jax.make_array_from_single_device_arrays((self.count, *x.shape), sharding, shards)

    return jax.tree.map(put, tree)

  def first(self, tree: Any) -> Any:
    """Returns the first device's share of a distributed tree, its leading axis of length 1 kept; no copy."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)

  def to_host(self, tree: Any) -> Any:
    """Copies the first device's share to NumPy arrays that later donation cannot touch."""
    return jax.tree.map(lambda x: np.array(x[0], copy=True), jax.device_get(self.first(tree)))

  def map(self, function: Callable[..., Any], *, in_axes: Any = 0, donate: tuple[int, ...] = ()) -> Any:
    """Compiles `function` to run on every device, with the axis `AXIS` between them.

    Args:
      function: sees its arguments without the leading axis.
      in_axes: 0 for distributed arguments, None for those that all devices share.
      donate: positions of arguments whose memory the results may take.
    """
    return jax.pmap(function, axis_name=AXIS, in_axes=in_axes, donate_argnums=donate, devices=self.devices)


def local_share(x: Array) -> Array:
  """Returns this device's contiguous share of an array that all devices have, along its first axis."""
  count = jax.lax.axis_size(AXIS)
  share = x.shape[0] // count
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * share, share)


def mean(tree: Any) -> Any:
  """Averages over devices; gradients are synchronised here and nowhere else."""
  return jax.lax.pmean(tree, AXIS)


def total(tree: Any) -> Any:
  """Adds over devices."""
  return jax.lax.psum(tree, AXIS)


def weighted_mean(term: Term) -> Array:
  """Returns the weighted mean of a term over the whole batch, 0 without any weight."""
  weight = total(jnp.sum(term.weights))
  return total(jnp.sum(term.values * term.weights)) / jnp.maximum(weight, 1e-8)


def reduce_metrics(metrics: Mapping[str, Array | Term]) -> dict[str, Array]:
  """Averages terms by their weights and scalars plainly, and adds matrices (counts), over devices."""

  def reduce(x: Array | Term) -> Array:
    if isinstance(x, Term):
      return weighted_mean(x)
    return mean(x) if jnp.ndim(x) == 0 else total(x)

  return {name: reduce(x) for name, x in metrics.items()}
