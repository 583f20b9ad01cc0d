"""Reads the arrays of a PyTorch `.pt` file without running anything from it.

A `.pt` file is a zip archive of a pickle and raw storages. Where torch is installed its own `weights_only` loader
reads it; otherwise the unpickler here, which knows ordered dictionaries and tensors and refuses everything else.
"""

import collections
import importlib.util
import io
import os
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from jedi_jax.errors import UserError

_DTYPES = {
  "FloatStorage": np.float32,
  "DoubleStorage": np.float64,
  "HalfStorage": np.float16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}


def load_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Returns the arrays of a file that holds a dictionary from names to tensors.

  Raises:
    UserError: if the file cannot be read, is damaged, or holds anything else.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise UserError(f"{file} is not a file")
  try:
    data = _load_with_torch(file) if importlib.util.find_spec("torch") else _load(file)
  except UserError:
    raise
  except Exception as error:  # Damaged files fail in many ways, in zipfile, pickle and numpy.
    reason = (str(error).splitlines() or [""])[0][:120]
    raise UserError(f"{file} is not a readable PyTorch file ({type(error).__name__}: {reason})") from None
  if not isinstance(data, Mapping):
    raise UserError(f"{file} holds a {type(data).__name__}, not a dictionary of tensors")
  for name, value in data.items():
    if not isinstance(name, str) or not isinstance(value, np.ndarray):
      raise UserError(f"{file} holds {type(value).__name__} at {name!r}, not a tensor")
  return dict(data)


def _load_with_torch(file: pathlib.Path) -> Any:
  import torch

  data = torch.load(file, map_location="cpu", weights_only=True)
  if not isinstance(data, Mapping):
    return data
  return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in data.items()}


def _load(file: pathlib.Path) -> Any:
  with zipfile.ZipFile(file) as archive:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise UserError(f"{file} is not a PyTorch file: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    return _Unpickler(archive, root).load()


class _Storage:
  """Raw numbers of one storage."""

  def __init__(self, values: np.ndarray):
    self.values = values


class _Unpickler(pickle.Unpickler):
  """Knows tensors and ordered dictionaries; every other name in the pickle is refused, so nothing can be called."""

  def __init__(self, archive: zipfile.ZipFile, root: str):
    super().__init__(io.BytesIO(archive.read(root + "data.pkl")))
    self._archive, self._root = archive, root

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _rebuild_tensor
    if module == "torch" and name in _DTYPES:
      return np.dtype(_DTYPES[name])
    raise UserError(f"the file asks for {module}.{name}, which a checkpoint does not need: refused")

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, count = pid
    if kind != "storage" or not isinstance(dtype, np.dtype):
      raise UserError("the file refers to something that is not a storage: refused")
    raw = self._archive.read(f"{self._root}data/{key}")
    values = np.frombuffer(raw, dtype)
    if len(values) < count:
      raise UserError(f"storage {key} is cut short: {len(values)} of {count} numbers")
    return _Storage(values)


def _rebuild_tensor(
  storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
  """Rebuilds a tensor, with its bounds checked: strides from a file must not reach outside of the storage."""
  if not isinstance(storage, _Storage) or len(size) != len(stride):
    raise UserError("the file describes a tensor that makes no sense")
  if any(n < 0 for n in size) or any(s < 0 for s in stride) or offset < 0:
    raise UserError("the file describes a tensor of negative size")
  values = storage.values
  if 0 in size:
    return np.zeros(size, values.dtype)
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if last >= len(values):
    raise UserError("the file describes a tensor that reaches outside of its storage")
  strides = tuple(s * values.itemsize for s in stride)
  return np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False).copy()
