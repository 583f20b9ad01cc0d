"""Devices: the only module that knows how many there are, and how runs are placed on them.

`jax.pmap` is in maintenance mode, and all of its uses are here. A distributed array has a leading axis over devices
and, with packed runs, a second one over the runs of a device. The devices may belong to several processes, each of
which sees its own shards of an array.
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
"""Axis over the devices that share one run; absent if each run has one device."""
_PACKS = "packs"


class Devices:
  """Devices, and the runs that they train: one run that all of them share, or several runs, each on one device.

  Args:
    devices: all if None, of every process that `jax.distributed` connects.
    runs: number of runs that train together; if more than one, a multiple of the number of devices.

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
    """Returns the first `count` devices of every process, or all of them for 0.

    Raises:
      UserError: if there are fewer.
    """
    available = jax.local_devices()
    if not 0 <= count <= len(available):
      raise UserError(f"--devices={count}, but this process has {len(available)}: take 0 (all) to {len(available)}")
    return cls(_first(count) if count else None)

  def with_runs(self, runs: int) -> "Devices":
    """Returns the same devices for another number of runs; fewer runs than devices use the first devices.

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
    """Number of processes that own the devices."""
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

  def check_batch(self, batch_size: int, setting: str = "training.batch_size") -> None:
    """Checks that the devices of one run can share a batch equally.

    Raises:
      UserError: if the batch size is no multiple of the number of devices.
    """
    if not self.packed and batch_size % self.count:
      raise UserError(
        f"{setting}={batch_size} is not divisible by {self.count} devices: "
        f"take a multiple of {self.count}, or fewer devices (--devices)"
      )

  def to_devices(self, trees: Sequence[Any]) -> Any:
    """Copies each run's arrays to its devices. With several processes, all must call this together.

    Args:
      trees: one pytree of arrays a run, all of the same shapes; with several processes, those of the first.

    Returns:
      The tree with leaves [devices, ...], one copy a device, or with packed runs [devices, runs of a device, ...].
    """
    if self.processes > 1:
      trees = broadcast(trees)
    sharding = self._sharding(0)  # That of the results of `map`.
    local = [device for device in self.devices if device.process_index == jax.process_index()]
    share = self._runs_of_a_device

    def put(*leaves: Any) -> Array:
      arrays = [np.asarray(x) for x in leaves]
      # One shard a device, each a copy, since aliased leaves cannot be donated.
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
    """Copies one run's arrays to NumPy arrays, which later donation does not affect."""

    def fetch(x: Array) -> np.ndarray:
      if self.packed:  # Only this run's part leaves the device.
        return np.array(self.pick(x, run), copy=True)
      return np.array(np.asarray(x.addressable_shards[0].data)[0], copy=True)

    return jax.tree.map(fetch, tree)

  def each_to_host(self, tree: Any) -> list[Any]:
    """Copies the arrays of all runs to NumPy arrays, one list entry a run.

    All copies are under way before the first is waited for.
    """
    places = [divmod(run, self._runs_of_a_device) for run in range(self.runs)]
    parts = [
      jax.tree.map(lambda x, device=device: x.addressable_shards[device].data, tree)
      for device in range(places[-1][0] + 1)
    ]
    copies = jax.device_get(parts)
    index = [(device, (0, place) if self.packed else (0,)) for device, place in places]
    return [jax.tree.map(lambda x, at=at: np.array(x[at]), copies[device]) for device, at in index]

  def map(self, function: Callable[..., Any], *, in_axes: Any = 0, donate: tuple[int, ...] = ()) -> Any:
    """Compiles `function` to run for every run on its devices, with the axis `AXIS` between the devices of one run.

    Args:
      function: takes arguments without the leading axes.
      in_axes: 0 for distributed arguments, None for shared ones; one value for all arguments, or a tuple.
      donate: positions of the arguments that are donated.
    """
    if self.count > 1 and self.devices[0].platform == "cpu":
      # Programs of several CPU devices crash when JAX reads them from its cache on disk, so none is written.
      jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    if self.processes > 1:
      return self._map_over_processes(function, in_axes, donate)
    mapped = jax.vmap(function, in_axes=in_axes) if self.packed else function
    return jax.pmap(mapped, axis_name=self._axis, in_axes=in_axes, donate_argnums=donate, devices=self.devices)

  def _map_over_processes(self, function: Callable[..., Any], in_axes: Any, donate: tuple[int, ...]) -> Any:
    """`map` for arrays of which this process has a part; `jax.pmap` would copy them and return local ones."""

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
    """Sharding of an argument of a mapped function: by its leading axis for 0, replicated for None."""
    mesh = jax.sharding.Mesh(np.asarray(self.devices), (self._axis,))
    spec = jax.sharding.PartitionSpec() if axis is None else jax.sharding.PartitionSpec(self._axis)
    return jax.sharding.NamedSharding(mesh, spec)


def broadcast(tree: Any) -> Any:
  """Returns the first process's arrays in all processes, as NumPy arrays; all call this together, with equal shapes."""
  return multihost_utils.broadcast_one_to_all(tree)


def _first(count: int | None) -> list[jax.Device]:
  """Returns the first devices of each process, process by process."""
  return [device for index in range(jax.process_count()) for device in jax.local_devices(index)[:count]]


@functools.partial(jax.jit, static_argnums=1)
def _index(tree: Any, index: tuple[int, ...]) -> Any:
  return jax.tree.map(lambda x: x[index], tree)


def _shared() -> bool:
  """Whether the function being traced runs on several devices of one run."""
  try:
    jax.lax.axis_size(AXIS)
  except NameError:
    return False
  return True


def local_share(x: Array) -> Array:
  """Returns this device's contiguous share, along the first axis, of an array that all devices of the run hold."""
  if not _shared():
    return x
  count = jax.lax.axis_size(AXIS)
  share = x.shape[0] // count
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * share, share)


def mean(tree: Any) -> Any:
  """Averages over the devices of a run; the only place that synchronises gradients."""
  return jax.lax.pmean(tree, AXIS) if _shared() else tree


def total(tree: Any) -> Any:
  """Adds over the devices of a run."""
  return jax.lax.psum(tree, AXIS) if _shared() else tree


def weighted_mean(term: Term) -> Array:
  """Returns the weighted mean of a term over the whole batch, 0 without any weight."""
  weight = total(jnp.sum(term.weights))
  return total(jnp.sum(term.values * term.weights)) / jnp.maximum(weight, 1e-8)


def reduce_metrics(metrics: Mapping[str, Array | Term]) -> dict[str, Array]:
  """Reduces metrics over devices: weighted means of terms, means of scalars, sums of matrices (counts)."""

  def reduce(x: Array | Term) -> Array:
    if isinstance(x, Term):
      return weighted_mean(x)
    return mean(x) if jnp.ndim(x) == 0 else total(x)

  return {name: reduce(x) for name, x in metrics.items()}
