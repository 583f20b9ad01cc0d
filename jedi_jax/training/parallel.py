"""Devices: the only place that knows how many there are, and how runs lie on them.

`jax.pmap` is in maintenance mode; all of its uses are here. A distributed array has a leading axis over devices and,
where several runs are packed, a second one over the runs of a device. Devices may be those of several processes, of
which each sees its own shards of an array.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jedi_jax.errors import UserError
from jedi_jax.types import Array, Term

AXIS = "devices"
"""Axis between the devices that share one run. Without it a run has its device to itself."""
_PACKS = "packs"


class Devices:
  """Devices, and the runs that they train: one that all of them share, or several, each whole on one device.

  Args:
    devices: which ones; all if None, of every process that `jax.distributed` has connected.
    runs: how many runs are trained together; several must be a multiple of the number of devices.

  Raises:
    UserError: if the runs cannot be spread evenly.
  """

  def __init__(self, devices: Sequence[jax.Device] | None = None, *, runs: int = 1):
    self.devices = tuple(_first(None) if devices is None else devices)
    self.runs = runs
    if runs > 1 and runs % self.count:
      raise UserError(
        f"{runs} runs cannot be spread evenly over {self.count} devices: "
        f"take a multiple of {self.count} runs, or other --devices"
      )

  @classmethod
  def take(cls, count: int) -> "Devices":
    """The first `count` devices of every process, all of them for 0.

    Raises:
      UserError: if there are fewer.
    """
    available = jax.local_devices()
    if not 0 <= count <= len(available):
      raise UserError(
        f"{count} devices are asked for and {len(available)} are here: take --devices=0 (all) to {len(available)}"
      )
    return cls(_first(count) if count else None)

  def with_runs(self, runs: int) -> "Devices":
    """The same devices for another number of runs; of fewer runs than devices each gets one of the first devices.

    Raises:
      UserError: if the runs cannot be spread evenly.
    """
    return Devices(self.devices[:runs] if 1 < runs < self.count else self.devices, runs=runs)

  @property
  def count(self) -> int:
    """Number of devices."""
    return len(self.devices)

  @property
  def processes(self) -> int:
    """Number of processes whose devices these are."""
    return len({device.process_index for device in self.devices})

  @property
  def packed(self) -> bool:
    """Whether there are several runs."""
    return self.runs > 1

  @property
  def _axis(self) -> str:
    return _PACKS if self.packed else AXIS

  @property
  def _runs_of_a_device(self) -> int:
    return max(self.runs // self.count, 1)

  def check_batch(self, batch_size: int) -> None:
    """Refuses a batch that the devices of one run cannot share equally.

    Raises:
      UserError: if the batch size is no multiple of the number of devices.
    """
    if not self.packed and batch_size % self.count:
      raise UserError(
        f"training.batch_size={batch_size} is not divisible by {self.count} devices: "
        f"take a multiple of {self.count}, or fewer devices (--devices)"
      )

  def to_devices(self, trees: Sequence[Any]) -> Any:
    """Copies each run's arrays to where the run lies. Of several processes all must call this together.

    Args:
      trees: one pytree of arrays a run, all of the same shapes; of several processes the first one's arrays count.

    Returns:
      The tree with leaves [devices, ...], every device with a copy, or [devices, runs of a device, ...].
    """
    if self.processes > 1:
      trees = broadcast(trees)
    sharding = self._sharding(0)  # As `map` gives its results.
    local = [device for device in self.devices if device.process_index == jax.process_index()]
    share = self._runs_of_a_device

    def put(*leaves: Any) -> Array:
      arrays = [np.asarray(x) for x in leaves]
      # One shard a device, each a copy of its own: leaves that alias could not be donated.
      if self.packed:
        parts = [np.stack(arrays[i * share : (i + 1) * share])[None] for i in range(self.count)]
      else:
        parts = [arrays[0][None].copy() for _ in local]
      shards = [jax.device_put(part, device) for part, device in zip(parts, local, strict=True)]
      return jax.make_array_from_single_device_arrays((self.count, *parts[0].shape[1:]), sharding, shards)

    return jax.tree.map(put, *trees)

  def shapes(self, tree: Any) -> Any:
    """Returns one run's arrays or shapes as `to_devices` lays them out, as `jax.ShapeDtypeStruct`."""
    leading = (self.count, self._runs_of_a_device) if self.packed else (self.count,)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype), tree)

  def pick(self, tree: Any, run: int = 0) -> Any:
    """Returns one run's arrays, as copies on its device."""
    device, place = divmod(run, self._runs_of_a_device)
    index = (0, place) if self.packed else (0,)
    return _index(jax.tree.map(lambda x: x.addressable_shards[device].data, tree), index)

  def to_host(self, tree: Any, run: int = 0) -> Any:
    """Copies one run's arrays to NumPy arrays that later donation cannot touch."""

    def fetch(x: Array) -> np.ndarray:
      if self.packed:  # Only this run's part leaves the device; a run alone needs no copy there.
        return np.array(self.pick(x, run), copy=True)
      return np.array(np.asarray(x.addressable_shards[0].data)[0], copy=True)

    return jax.tree.map(fetch, tree)

  def map(self, function: Callable[..., Any], *, in_axes: Any = 0, donate: tuple[int, ...] = ()) -> Any:
    """Compiles `function` to run for every run on its devices, with the axis `AXIS` between the devices of one run.

    Args:
      function: sees its arguments without the leading axes.
      in_axes: 0 for distributed arguments, None for those that all share; one for all arguments, or a tuple.
      donate: positions of arguments whose memory the results may take.
    """
    if self.count > 1 and self.devices[0].platform == "cpu":
      # Programs of several CPU devices that are read back from JAX's cache on disk crash: from now on none is written.
      jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    if self.processes > 1:
      return self._map_over_processes(function, in_axes, donate)
    mapped = jax.vmap(function, in_axes=in_axes) if self.packed else function
    return jax.pmap(mapped, axis_name=self._axis, in_axes=in_axes, donate_argnums=donate, devices=self.devices)

  def _map_over_processes(self, function: Callable[..., Any], in_axes: Any, donate: tuple[int, ...]) -> Any:
    """As `map`, for arrays of which this process has a part: `jax.pmap` would copy them and give local ones back."""

    def on_device(*args: Any) -> Any:
      axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
      own = [jax.tree.map(lambda x: x[0], x) if axis == 0 else x for x, axis in zip(args, axes, strict=True)]
      return jax.tree.map(lambda x: x[None], function(*own))

    axes = in_axes if isinstance(in_axes, tuple) else (in_axes,)
    shardings = tuple(self._sharding(axis) for axis in axes)
    inputs = shardings if isinstance(in_axes, tuple) else shardings[0]
    specs = jax.tree.map(lambda sharding: sharding.spec, inputs)
    output = self._sharding(0)
    mapped = jax.shard_map(on_device, mesh=output.mesh, in_specs=specs, out_specs=output.spec, check_vma=False)
    return jax.jit(mapped, in_shardings=inputs, out_shardings=output, donate_argnums=donate)

  def _sharding(self, axis: int | None) -> jax.sharding.NamedSharding:
    """How an argument of a mapped function lies: by its leading axis for 0, the same everywhere for None."""
    mesh = jax.sharding.Mesh(np.asarray(self.devices), (self._axis,))
    spec = jax.sharding.PartitionSpec() if axis is None else jax.sharding.PartitionSpec(self._axis)
    return jax.sharding.NamedSharding(mesh, spec)


def broadcast(tree: Any) -> Any:
  """Returns the first process's arrays in all of them, as NumPy arrays; all call this together, with equal shapes."""
  return multihost_utils.broadcast_one_to_all(tree)


def _first(count: int | None) -> list[jax.Device]:
  """The first devices of each process, those of one after those of the other."""
  return [device for index in range(jax.process_count()) for device in jax.local_devices(index)[:count]]


@functools.partial(jax.jit, static_argnums=1)
def _index(tree: Any, index: tuple[int, ...]) -> Any:
  return jax.tree.map(lambda x: x[index], tree)


def _shared() -> bool:
  """Whether what is being traced shares its run with other devices."""
  try:
    jax.lax.axis_size(AXIS)
  except NameError:
    return False
  return True


def local_share(x: Array) -> Array:
  """Returns this device's contiguous share of an array that all devices of the run have, along its first axis."""
  if not _shared():
    return x
  count = jax.lax.axis_size(AXIS)
  share = x.shape[0] // count
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * share, share)


def mean(tree: Any) -> Any:
  """Averages over the devices of a run; gradients are synchronised here and nowhere else."""
  return jax.lax.pmean(tree, AXIS) if _shared() else tree


def total(tree: Any) -> Any:
  """Adds over the devices of a run."""
  return jax.lax.psum(tree, AXIS) if _shared() else tree


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
