"""Checkpoints, written and read by Orbax. No other module imports it, and it is imported when first used.

A checkpoint is a flat dictionary from paths such as 'params/encoder/conv_in/kernel' to NumPy arrays, with checksums.
Small arrays are packed into one. Neither code nor devices are stored: a checkpoint restores onto any number of devices.
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
from absl import logging

from jedi_jax.errors import UserError

_PARAMS = "params"
_STATE = "state"
_CHECKSUMS = "crc32"  # uint32, one for each stored array, in the order of the sorted names.
_PACKED = "packed"  # uint8: the index's length in 8 bytes, the index as JSON ([name, dtype, shape] each), the arrays.
_LARGE = 2**24
"""Arrays of at least this many bytes are stored separately. Orbax leaks some memory for every array it stores."""


class SaveError(UserError):
  """A checkpoint cannot be written. Earlier checkpoints are unchanged."""


class Restored(NamedTuple):
  """A restored checkpoint.

  Attributes:
    number: the checkpoint's number.
    params: parameters, all that inference needs.
    state: everything else.
  """

  number: int
  params: Any
  state: Any


class Checkpoints:
  """The newest checkpoints of a directory, by number. Saving is asynchronous and atomic.

  Only one process saves to a directory: unfinished saves of others are removed.

  Args:
    directory: created if missing.
    keep: number of checkpoints to keep.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int):
    self._path = pathlib.Path(directory).absolute()
    self._keep = keep
    self._saving: int | None = None
    self._path.mkdir(parents=True, exist_ok=True)
    self._open()

  def _open(self) -> None:
    ocp = import_orbax()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep, create=False, cleanup_tmp_directories=True, multiprocessing_options=_this_process(ocp)
    )
    self._manager = ocp.CheckpointManager(self._path, options=options)

  def latest(self) -> int | None:
    """Returns the number of the newest checkpoint, None without any."""
    return self._manager.latest_step()

  def save(self, number: int, *, params: Any, state: Any = None) -> None:
    """Starts saving a checkpoint.

    Args:
      number: larger than all earlier numbers; nothing is saved if it exists already.
      params: pytree of NumPy arrays that inference needs; must not change until `wait` or the next `save`.
      state: pytree of NumPy arrays that only training needs; must not change either.

    Raises:
      SaveError: if the save cannot start, or the previous one failed (then this one does not start).
    """
    ocp = import_orbax()
    self.wait()
    if number in self._manager.all_steps():
      return
    items = {_PARAMS: ocp.args.StandardSave(_pack(flatten(params)))}
    if state is not None:
      items[_STATE] = ocp.args.StandardSave(_pack(flatten(state)))
    self._saving = number
    try:
      self._manager.save(number, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and its storage raise many types.
      self._fail(error)

  def restore(self, number: int, *, params: Any, state: Any) -> tuple[Any, Any]:
    """Restores a checkpoint as NumPy arrays.

    Args:
      number: the checkpoint's number.
      params: pytree of arrays or of `jax.ShapeDtypeStruct` with the expected shapes and dtypes of the parameters.
      state: the same for the state.

    Raises:
      UserError: if the checkpoint cannot be read, is damaged, or has other arrays.
    """
    return _restore(self._path, number, _PARAMS, params), _restore(self._path, number, _STATE, state)

  def restore_newest(self, *, params: Any, state: Any, log: Callable[[str], None]) -> Restored | None:
    """Restores the newest checkpoint that is valid, and moves newer ones to the sibling directory `damaged`.

    Args:
      params: as in `restore`.
      state: as in `restore`.
      log: called with a line for each checkpoint that is moved.

    Returns:
      The checkpoint, or None if the directory has none.

    Raises:
      UserError: if no checkpoint is valid; nothing is moved then.
    """
    damaged: list[tuple[int, UserError]] = []
    for number in reversed(_numbers(self._path)):
      try:
        restored = Restored(number, *self.restore(number, params=params, state=state))
      except UserError as error:
        damaged.append((number, error))
        continue
      for other, problem in damaged:
        log(f"{problem}; it is moved to {self._set_aside(other)}, and checkpoint {number} is used")
      return restored
    if damaged:
      others = f", nor are the {len(damaged) - 1} before it usable" if len(damaged) > 1 else ""
      raise UserError(f"{damaged[0][1]}{others}: nothing was changed; --overwrite restarts the run")
    return None

  def _set_aside(self, number: int) -> pathlib.Path:
    """Moves a damaged checkpoint and returns its new path."""
    target = self._path.with_name("damaged") / f"{self._path.name}_{number}"
    while target.exists():
      target = target.with_name(target.name + "_")
    target.parent.mkdir(exist_ok=True)
    (self._path / str(number)).rename(target)
    self._manager.reload()
    return target

  def delete_after(self, number: int) -> None:
    """Deletes checkpoints with larger numbers, whose epochs a resumed run repeats."""
    for later in self._manager.all_steps():
      if later > number:
        self._manager.delete(later)

  def wait(self) -> None:
    """Waits for the save in progress, if any.

    Raises:
      SaveError: if it failed.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      self._fail(error)
    self._saving = None

  def _fail(self, error: Exception) -> None:
    """Reopens the directory after a failed save and raises `SaveError`."""
    number, self._saving = self._saving, None
    with contextlib.suppress(Exception):  # Closing raises the same error again.
      self._manager.close()
    self._open()
    latest = self.latest()
    kept = "there is no earlier one" if latest is None else f"checkpoint {latest} is kept"
    raise SaveError(f"checkpoint {number} in {self._path} could not be written ({_reason(error)}); {kept}") from None

  def close(self) -> None:
    """Waits for the save in progress and frees resources; call `wait` before to see whether the save succeeded."""
    with contextlib.suppress(Exception):
      self._manager.close()


def newest(directory: str | os.PathLike[str]) -> int | None:
  """Returns the number of the newest checkpoint in a directory, None without any; creates nothing."""
  return max(_numbers(pathlib.Path(directory).absolute()), default=None)


def _numbers(path: pathlib.Path) -> list[int]:
  """Returns the sorted numbers of all checkpoints in a directory, damaged ones included."""
  return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal()) if path.is_dir() else []


def load_params(directory: str | os.PathLike[str], target: Any) -> tuple[Any, int]:
  """Restores the parameters of the newest valid checkpoint in a directory, and warns of newer ones.

  Args:
    directory: as given to `Checkpoints`.
    target: pytree of `jax.ShapeDtypeStruct` with the expected shapes and dtypes.

  Returns:
    The parameters, and the number of the checkpoint.

  Raises:
    UserError: if there is no checkpoint, or none that is valid.
  """
  return _newest_valid(directory, lambda path, number: (_restore(path, number, _PARAMS, target), number))


def load_state(directory: str | os.PathLike[str], part: str) -> dict[str, np.ndarray]:
  """Reads a part of the state of the newest valid checkpoint in a directory, and warns of newer ones.

  Args:
    directory: as given to `Checkpoints`.
    part: name of an entry of the saved state, such as 'replay'.

  Returns:
    The arrays of the part by their names in it.

  Raises:
    UserError: if there is no checkpoint, or none that is valid.
  """
  state = _newest_valid(directory, lambda path, number: _read(path, number, _STATE))
  return {name.removeprefix(f"{part}/"): array for name, array in state.items() if name.startswith(f"{part}/")}


def _newest_valid(directory: str | os.PathLike[str], read_one: Callable[[pathlib.Path, int], Any]) -> Any:
  """Returns what `read_one` reads of the newest checkpoint for which it raises no `UserError`."""
  path = pathlib.Path(directory).absolute()
  numbers = _numbers(path)
  if not numbers:
    raise UserError(f"there is no checkpoint in {path}")
  import_orbax()  # Raises outside of the loop, which takes errors for damage.
  for number in reversed(numbers):
    try:
      return read_one(path, number)
    except UserError as error:
      if number == numbers[0]:
        raise
      logging.warning("%s: an older one is used", error)
  raise AssertionError("the oldest checkpoint is either returned or refused")


def read(directory: str | os.PathLike[str], number: int) -> dict[str, np.ndarray]:
  """Reads all arrays of a checkpoint with a state, by names such as 'params/encoder/conv_in/kernel'.

  Args:
    directory: as given to `Checkpoints`.
    number: the checkpoint's number.

  Raises:
    UserError: if there is no such checkpoint, or it is damaged.
  """
  path = pathlib.Path(directory).absolute()
  items = {item: _read(path, number, item) for item in (_PARAMS, _STATE)}
  return {f"{item}/{name}": array for item, arrays in items.items() for name, array in arrays.items()}


def import_orbax() -> Any:
  """Imports Orbax, which takes about a second and which a program without checkpoints does not need.

  Raises:
    UserError: if it is not installed.
  """
  try:
    import orbax.checkpoint as ocp
  except ImportError:
    raise UserError("checkpoints need Orbax: pip install orbax-checkpoint") from None
  return ocp


def _this_process(ocp: Any) -> Any:
  """Returns options that keep Orbax from waiting for other processes, which may not read or write checkpoints."""
  index = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})


def _read(directory: pathlib.Path, number: int, item: str) -> dict[str, np.ndarray]:
  """Reads the arrays of one item of a checkpoint."""
  ocp = import_orbax()
  options = {"multiprocessing_options": _this_process(ocp)}
  try:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler(**options), **options) as reader:
      restored = reader.restore(directory / str(number) / item, args=ocp.args.StandardRestore())
    stored = {name: np.asarray(value) for name, value in restored.items()}
  except Exception as error:  # Orbax and its storage raise many types.
    raise UserError(f"{_where(directory, number)} cannot be read ({_reason(error)})") from None
  return _verified(stored, item, _where(directory, number))


def _verified(stored: Mapping[str, np.ndarray], item: str, where: str) -> dict[str, np.ndarray]:
  """Checks the checksums of stored arrays and unpacks them."""
  stored = dict(stored)
  checksums = stored.pop(_CHECKSUMS, np.empty(0, np.uint32))
  if _PACKED not in stored or not np.array_equal(checksums, _checksums(stored)):
    raise UserError(f"{where} is damaged: the checksums of its {item} differ")
  try:
    return _unpack(stored)
  except Exception as error:  # JSON and NumPy raise many types.
    raise UserError(f"{where} is altered: the index of its {item} is not valid ({_reason(error)})") from None


def _restore(directory: pathlib.Path, number: int, item: str, target: Any) -> Any:
  """Reads one item of a checkpoint as a pytree of the target's structure, shapes and dtypes."""
  return unflatten(_read(directory, number, item), target, where=_where(directory, number))


def unflatten(saved: Mapping[str, np.ndarray], target: Any, *, where: str) -> Any:
  """Inverts `flatten`.

  Args:
    saved: arrays by path.
    target: pytree of arrays or of `jax.ShapeDtypeStruct` with the expected paths, shapes and dtypes.
    where: what holds the arrays, for error messages.

  Raises:
    UserError: if a path, a shape or a dtype differs.
  """
  misfit = f"{where} does not fit this configuration"
  wanted = flatten(target)
  problems = sorted(set(wanted) ^ set(saved))
  if problems:
    first = f"lacks {problems[0]}" if problems[0] in wanted else f"has an unknown {problems[0][:200]!r}"
    raise UserError(f"{misfit}: it {first}, and {len(problems) - 1} more")
  for name, like in wanted.items():
    value = saved[name]
    if tuple(value.shape) != tuple(like.shape) or value.dtype != like.dtype:
      raise UserError(f"{misfit}: {name} is {value.dtype}{list(value.shape)}, expected {like.dtype}{list(like.shape)}")
  return jax.tree.unflatten(jax.tree.structure(target), [saved[name] for name in wanted])


def _where(directory: pathlib.Path, number: int) -> str:
  return f"checkpoint {number} in {directory}"


def _reason(error: Exception) -> str:
  """Returns the first line of an error, shortened."""
  text = (str(error).splitlines() or [type(error).__name__])[0]
  return "No space left on device" if "No space left" in text else text[:200]


def _pack(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the arrays to store: the large ones, the packed small ones, and the checksums of both."""
  for name in (_CHECKSUMS, _PACKED):
    if name in arrays:
      raise ValueError(f"the name {name} is reserved")
  small = {name: np.asarray(x) for name, x in arrays.items() if x.nbytes < _LARGE}
  if not all(x.dtype.isnative for x in small.values()):
    raise ValueError("arrays must have the native byte order")
  index = json.dumps([(name, x.dtype.name, x.shape) for name, x in small.items()]).encode()
  head = np.frombuffer(len(index).to_bytes(8, "little") + index, np.uint8)
  stored = {name: x for name, x in arrays.items() if name not in small}
  stored[_PACKED] = np.concatenate([head, *map(_bytes, small.values())])
  return {**stored, _CHECKSUMS: _checksums(stored)}


def _unpack(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Inverts `_pack`."""
  arrays = dict(stored)
  packed = arrays.pop(_PACKED)
  start = 8 + int.from_bytes(packed[:8].tobytes(), "little")
  for name, dtype, shape in json.loads(packed[8:start].tobytes()):
    if not isinstance(name, str) or not all(type(size) is int and size >= 0 for size in shape):
      raise TypeError("it has no names and shapes")  # A product with a string or a list would repeat it.
    end = start + np.dtype(dtype).itemsize * math.prod(shape)
    arrays[name] = packed[start:end].copy().view(dtype).reshape(shape)  # The copy is aligned.
    start = end
  return arrays


def _checksums(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
  """Returns the CRC-32 of each array, in the order of the sorted names."""
  return np.asarray([zlib.crc32(_bytes(arrays[name]).data) for name in sorted(arrays)], np.uint32)


def _bytes(array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def flatten(tree: Any) -> Mapping[str, Any]:
  """Returns the leaves of a pytree by path, such as 'encoder/conv_in/kernel', in tree order."""
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
