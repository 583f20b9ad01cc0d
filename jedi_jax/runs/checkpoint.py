"""Checkpoints: the only importer of orbax.

A checkpoint is a flat dictionary from paths such as 'params/encoder/conv_in/kernel' to NumPy arrays, the small ones
packed into one, and checksums. It holds data, no code and no devices: it is restored onto however many devices there
are.
"""

import contextlib
import json
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from jedi_jax.errors import UserError

# The first of several processes reads and writes; no barrier waits for the others, who know of no checkpoint.
_FIRST_ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
_PARAMS = "params"
_STATE = "state"
_CHECKSUMS = "crc32"  # [stored arrays] uint32, in the order of their sorted names.
_PACKED = "packed"  # Small arrays: 8 bytes with the length of an index, [name, dtype, shape] each in JSON, their bytes.
_LARGE = 2**24
"""Bytes from which on an array is stored by itself. Of every stored array Orbax keeps some memory for good."""


class SaveError(UserError):
  """A checkpoint that could not be written; those before it are as they were."""


class Restored(NamedTuple):
  """A checkpoint that was read.

  Attributes:
    number: which one.
    params: what inference needs.
    state: the rest.
  """

  number: int
  params: Any
  state: Any


class Checkpoints:
  """Numbered checkpoints in a directory, the newest kept. Saving is asynchronous and atomic.

  Args:
    directory: made if it does not exist.
    keep: how many are kept.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int):
    self._path = pathlib.Path(directory).absolute()
    self._keep = keep
    self._saving: int | None = None
    self._path.mkdir(parents=True, exist_ok=True)
    self._open()

  def _open(self) -> None:
    # What a killed or failed save left is removed: only one process saves here.
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep, create=False, cleanup_tmp_directories=True, multiprocessing_options=_FIRST_ALONE
    )
    self._manager = ocp.CheckpointManager(self._path, options=options)

  def latest(self) -> int | None:
    """The number of the newest checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(self, number: int, *, params: Any, state: Any = None) -> None:
    """Starts saving.

    Args:
      number: larger than those before; an existing number is left as it is.
      params: pytree of NumPy arrays that inference needs; must not change until `wait` or the next `save`.
      state: the same for what only training needs.

    Raises:
      SaveError: if this one cannot be begun, or the one before could not be finished (this one is not begun then).
    """
    self.wait()
    if number in self._manager.all_steps():
      return
    items = {_PARAMS: ocp.args.StandardSave(_pack(_flatten(params)))}
    if state is not None:
      items[_STATE] = ocp.args.StandardSave(_pack(_flatten(state)))
    self._saving = number
    try:
      self._manager.save(number, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and its storage raise many kinds.
      self._fail(error)

  def restore(self, number: int, *, params: Any, state: Any) -> tuple[Any, Any]:
    """Restores a checkpoint as NumPy arrays.

    Args:
      number: which one.
      params: pytree of arrays or of `jax.ShapeDtypeStruct`, what the parameters must look like.
      state: the same for the rest.

    Raises:
      UserError: if the checkpoint has other arrays, cannot be read, or holds other numbers than were written.
    """
    return _restore(self._manager, number, _PARAMS, params), _restore(self._manager, number, _STATE, state)

  def restore_newest(self, *, params: Any, state: Any, log: Callable[[str], None]) -> Restored | None:
    """Restores the newest whole checkpoint that fits; those after it are set aside, into `damaged` beside this one.

    Args:
      params: as for `restore`.
      state: as for `restore`.
      log: is told of each checkpoint that is not whole or does not fit.

    Returns:
      None where there is no checkpoint at all.

    Raises:
      UserError: if there are checkpoints and none can be used; nothing was changed.
    """
    damaged: list[tuple[int, UserError]] = []
    for number in reversed(_numbers(self._path)):
      try:
        restored = Restored(number, *self.restore(number, params=params, state=state))
      except UserError as error:
        damaged.append((number, error))
        continue
      for other, problem in damaged:
        log(f"{problem}; it is set aside in {self._set_aside(other)}, and checkpoint {number} is used")
      return restored
    if damaged:
      others = f", and neither can the {len(damaged) - 1} before it" if len(damaged) > 1 else ""
      raise UserError(f"{damaged[0][1]}{others}: nothing was changed; --overwrite starts the run anew")
    return None

  def _set_aside(self, number: int) -> pathlib.Path:
    place = self._path.with_name("damaged") / f"{self._path.name}_{number}"
    while place.exists():
      place = place.with_name(place.name + "_")
    place.parent.mkdir(exist_ok=True)
    (self._path / str(number)).rename(place)
    self._manager.reload()
    return place

  def forget_after(self, number: int) -> None:
    """Removes checkpoints with larger numbers: those of epochs that an interrupted run will repeat."""
    for later in self._manager.all_steps():
      if later > number:
        self._manager.delete(later)

  def wait(self) -> None:
    """Returns when nothing is being saved.

    Raises:
      SaveError: if what was being saved could not be written.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      self._fail(error)
    self._saving = None

  def _fail(self, error: Exception) -> None:
    """Begins anew after a save that failed, and tells of it."""
    number, self._saving = self._saving, None
    with contextlib.suppress(Exception):  # It tells of the same error once more.
      self._manager.close()
    self._open()
    latest = self.latest()
    kept = "there is none before it" if latest is None else f"checkpoint {latest} is kept"
    raise SaveError(f"checkpoint {number} in {self._path} could not be written ({_reason(error)}); {kept}") from None

  def close(self) -> None:
    """Waits, and frees what the checkpoints hold; a save that fails now is told of by `wait` alone."""
    with contextlib.suppress(Exception):
      self._manager.close()


def newest(directory: str | os.PathLike[str]) -> int | None:
  """The number of the newest checkpoint in a directory, None if there is none; nothing is made."""
  return max(_numbers(pathlib.Path(directory).absolute()), default=None)


def _numbers(path: pathlib.Path) -> list[int]:
  """The numbers of the checkpoints in a directory, whole or not, in order."""
  return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal()) if path.is_dir() else []


def load_params(directory: str | os.PathLike[str], target: Any) -> Any:
  """Restores the parameters of the newest whole checkpoint in a directory; a warning names newer ones.

  Args:
    directory: as given to `Checkpoints`.
    target: pytree of `jax.ShapeDtypeStruct`.

  Raises:
    UserError: if there is none that is whole and fits.
  """
  path = pathlib.Path(directory).absolute()
  numbers = _numbers(path)
  if not numbers:
    raise UserError(f"there is no checkpoint in {path}")
  with _read_only(path) as manager:
    for number in reversed(numbers):
      try:
        return _restore(manager, number, _PARAMS, target)
      except UserError as error:
        if number == numbers[0]:
          raise
        logging.warning("%s: an older one is used", error)
  raise AssertionError("the oldest checkpoint was neither read nor refused")


def read(directory: str | os.PathLike[str], number: int) -> dict[str, np.ndarray]:
  """Reads all arrays of a checkpoint that has a state, by names such as 'params/encoder/conv_in/kernel'.

  Args:
    directory: as given to `Checkpoints`.
    number: which checkpoint.

  Raises:
    UserError: if there is none, or it is damaged.
  """
  with _read_only(pathlib.Path(directory).absolute()) as manager:
    items = {item: _read(manager, number, item) for item in (_PARAMS, _STATE)}
  return {f"{item}/{name}": array for item, arrays in items.items() for name, array in arrays.items()}


def _read_only(path: pathlib.Path) -> Any:
  options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
  return ocp.CheckpointManager(path, options=options)


def _read(manager: Any, number: int, item: str) -> dict[str, np.ndarray]:
  """The arrays of one item of a checkpoint, as they were written."""
  where = _where(manager, number)
  try:
    stored = manager.restore(number, args=ocp.args.Composite(**{item: ocp.args.StandardRestore()}))[item]
    stored = {name: np.asarray(value) for name, value in stored.items()}
  except Exception as error:  # Orbax and its storage raise many kinds.
    raise UserError(f"{where} cannot be read ({_reason(error)})") from None
  sums = stored.pop(_CHECKSUMS, None)
  if sums is None:
    raise UserError(f"{where} has no checksums: an older version wrote it, or it is damaged")
  if not np.array_equal(sums, _checksums(stored)):
    raise UserError(f"{where} is damaged: its {item} are not what was written")
  return _unpack(stored)


def _restore(manager: Any, number: int, item: str, target: Any) -> Any:
  where = _where(manager, number)
  wanted, saved = _flatten(target), _read(manager, number, item)
  problems = sorted(set(wanted) ^ set(saved))
  if problems:
    kind = "lacks" if problems[0] in wanted else "has an unknown"
    raise UserError(f"{where} does not fit this configuration: it {kind} {problems[0]}, and {len(problems) - 1} more")
  for name, like in wanted.items():
    value = saved[name]
    if tuple(value.shape) != tuple(like.shape) or value.dtype != like.dtype:
      raise UserError(
        f"{where} does not fit this configuration: {name} is {value.dtype}{list(value.shape)}, "
        f"expected {like.dtype}{list(like.shape)}"
      )
  return jax.tree.unflatten(jax.tree.structure(target), [saved[name] for name in wanted])


def _where(manager: Any, number: int) -> str:
  return f"checkpoint {number} in {manager.directory}"


def _reason(error: Exception) -> str:
  """The first line of an error, without most of what storage says around it."""
  text = (str(error).splitlines() or [type(error).__name__])[0]
  return "No space left on device" if "No space left" in text else text[:200]


def _pack(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns what is stored of arrays: the large ones, the others in one, and the checksums of all these."""
  for name in (_CHECKSUMS, _PACKED):
    if name in arrays:
      raise ValueError(f"an array is named {name}, as what is stored beside the arrays")
  small = {name: np.asarray(x) for name, x in arrays.items() if x.nbytes < _LARGE}
  if not all(x.dtype.isnative for x in small.values()):
    raise ValueError("arrays of another machine's byte order cannot be stored")
  index = json.dumps([(name, x.dtype.name, x.shape) for name, x in small.items()]).encode()
  head = np.frombuffer(len(index).to_bytes(8, "little") + index, np.uint8)
  stored = {name: x for name, x in arrays.items() if name not in small}
  stored[_PACKED] = np.concatenate([head, *map(_bytes, small.values())])
  return {**stored, _CHECKSUMS: _checksums(stored)}


def _unpack(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays that `_pack` was given."""
  arrays = {name: x for name, x in stored.items() if name != _PACKED}
  packed = stored.get(_PACKED)
  if packed is None:  # Before arrays were packed.
    return arrays
  start = 8 + int.from_bytes(packed[:8].tobytes(), "little")
  for name, dtype, shape in json.loads(packed[8:start].tobytes()):
    end = start + np.dtype(dtype).itemsize * math.prod(shape)
    arrays[name] = packed[start:end].copy().view(dtype).reshape(shape)  # The copy is aligned.
    start = end
  return arrays


def _checksums(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
  """CRC-32 of each array, in the order of their sorted names."""
  return np.asarray([zlib.crc32(_bytes(arrays[name]).data) for name in sorted(arrays)], np.uint32)


def _bytes(array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _flatten(tree: Any) -> Mapping[str, Any]:
  """Returns the leaves by path, in the tree's order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  flat = {"/".join(_key_name(key) for key in path) or "value": leaf for path, leaf in leaves}
  if len(flat) != len(leaves):
    raise ValueError("two leaves have the same path")
  return flat


def _key_name(key: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)
