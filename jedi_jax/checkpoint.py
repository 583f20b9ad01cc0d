"""Checkpoints: the only importer of orbax.

A checkpoint is a flat dictionary from paths such as 'params/encoder/conv_in/kernel' to NumPy arrays. It holds data, no
code and no devices: it is restored onto however many devices there are.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jedi_jax.errors import UserError

# The first of several processes reads and writes; no barrier waits for the others, who know of no checkpoint.
_FIRST_ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
_PARAMS = "params"
_STATE = "state"


class Checkpoints:
  """Numbered checkpoints in a directory, the newest kept. Saving is asynchronous and atomic.

  Args:
    directory: made if it does not exist.
    keep: how many are kept.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False, multiprocessing_options=_FIRST_ALONE)
    self._path = pathlib.Path(directory).absolute()
    self._path.mkdir(parents=True, exist_ok=True)
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
    """
    if number in self._manager.all_steps():
      return
    items = {_PARAMS: ocp.args.StandardSave(_flatten(params))}
    if state is not None:
      items[_STATE] = ocp.args.StandardSave(_flatten(state))
    self._manager.save(number, args=ocp.args.Composite(**items))

  def restore(self, number: int, *, params: Any, state: Any) -> tuple[Any, Any]:
    """Restores a checkpoint as NumPy arrays.

    Args:
      number: which one.
      params: pytree of arrays or of `jax.ShapeDtypeStruct`, what the parameters must look like.
      state: the same for the rest.

    Raises:
      UserError: if the checkpoint has other arrays, or cannot be read.
    """
    return _restore(self._manager, number, _PARAMS, params), _restore(self._manager, number, _STATE, state)

  def forget_after(self, number: int) -> None:
    """Removes checkpoints with larger numbers: those of epochs that an interrupted run will repeat."""
    for later in self._manager.all_steps():
      if later > number:
        self._manager.delete(later)

  def wait(self) -> None:
    """Returns when nothing is being saved."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees what the checkpoints hold."""
    self._manager.close()


def newest(directory: str | os.PathLike[str]) -> int | None:
  """The number of the newest checkpoint in a directory, None if there is none; nothing is made."""
  path = pathlib.Path(directory).absolute()
  numbers = [int(entry.name) for entry in path.iterdir() if entry.name.isdigit()] if path.is_dir() else []
  return max(numbers, default=None)


def load_params(directory: str | os.PathLike[str], target: Any) -> Any:
  """Restores the parameters of the newest checkpoint in a directory.

  Args:
    directory: as given to `Checkpoints`.
    target: pytree of `jax.ShapeDtypeStruct`.

  Raises:
    UserError: if there is none, or it does not fit.
  """
  path = pathlib.Path(directory).absolute()
  number = newest(path)
  if number is None:
    raise UserError(f"there is no checkpoint in {path}")
  manager = ocp.CheckpointManager(
    path, options=ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
  )
  try:
    return _restore(manager, number, _PARAMS, target)
  finally:
    manager.close()


def _restore(manager: Any, number: int, item: str, target: Any) -> Any:
  where = f"checkpoint {number} in {manager.directory}"
  wanted = _flatten(target)
  try:
    saved = manager.restore(number, args=ocp.args.Composite(**{item: ocp.args.StandardRestore()}))[item]
  except Exception as error:  # Orbax and its storage raise many kinds.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{where} cannot be read ({reason[:200]})") from None
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
  leaves = [np.asarray(saved[name]) for name in wanted]
  return jax.tree.unflatten(jax.tree.structure(target), leaves)


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
