"""Reads the arrays of a PyTorch `.pt` file without executing code from it.

A `.pt` file is a zip archive of a pickle and raw storages. If a version of torch with a safe `weights_only` loader is
installed, that loader reads the file. Otherwise the unpickler of this module does: it accepts dictionaries and tensors
only, and bounds the memory that a file can request.
"""

import importlib.metadata
import io
import math
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jedi_jax.errors import UserError

_SAFE_TORCH = (2, 6)
"""Files can make the `weights_only` loader of earlier versions execute code (CVE-2025-32434)."""
_DTYPES = {
  "FloatStorage": np.float32,
  "DoubleStorage": np.float64,
  "HalfStorage": np.float16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
_MAX_BYTES = 4 << 30
"""Bound on the total size of the archive's members, and on that of the tensors."""
_MAX_PICKLE_BYTES = 64 << 20
_MAX_RATIO = 100
"""Bound on the compression ratio of a member, beyond the first MiB; torch itself does not compress."""


def load_arrays(path: str | os.PathLike[str], *, nested: bool = False) -> dict[str, np.ndarray]:
  """Reads the arrays of a file that contains a dictionary from names to tensors.

  Args:
    path: the `.pt` file.
    nested: whether values may be such dictionaries themselves; their tensors are named 'name.inner'.

  Returns:
    Arrays by name, in native byte order.

  Raises:
    UserError: if the file cannot be read, is damaged, or contains other objects.
  """
  file = pathlib.Path(os.path.expanduser(path))
  if not os.path.isfile(file):  # False for invalid names, unlike Path.is_file.
    raise UserError(f"{file} is not a file")
  try:
    data = _load_with_torch(file, nested) if _torch_is_safe() else _load(file, nested)
  except UserError as error:
    raise UserError(f"{file}: {error}") from None
  except Exception as error:  # Damaged files fail in many ways, in zipfile, pickle and numpy.
    reason = (str(error).splitlines() or [""])[0][:120]
    raise UserError(f"{file} is not a readable PyTorch file ({type(error).__name__}: {reason})") from None
  if not isinstance(data, Mapping):
    raise UserError(f"{file} holds a {type(data).__name__}, not a dictionary of tensors")
  for name, value in data.items():
    if not isinstance(name, str):
      raise UserError(f"{file} holds a {type(name).__name__} where the name of a tensor should be")
    if not isinstance(value, np.ndarray):
      raise UserError(f"{file} holds a {type(value).__name__.lstrip('_')} at {_short(name)}, not a tensor")
  return dict(data)


def _torch_is_safe() -> bool:
  """Returns whether a version of torch with a safe `weights_only` loader is installed; does not import torch."""
  try:
    version = importlib.metadata.version("torch")
  except importlib.metadata.PackageNotFoundError:
    return False
  match = re.match(r"(\d+)\.(\d+)", version)
  return match is not None and (int(match.group(1)), int(match.group(2))) >= _SAFE_TORCH


def _flat(data: Mapping[Any, Any]) -> dict[Any, Any]:
  """Returns a dictionary of dictionaries as one. Deeper ones, and names that are no strings, are refused later."""
  flat: dict[Any, Any] = {}
  for name, value in data.items():
    inner = value.items() if isinstance(value, Mapping) else ()
    flat |= {f"{name}.{own}" if isinstance(own, str) else own: x for own, x in inner}
    flat |= {} if isinstance(value, Mapping) else {name: value}
  return flat


def _load_with_torch(file: pathlib.Path, nested: bool) -> Any:  # noqa: FBT001
  import torch

  data = torch.load(file, map_location="cpu", weights_only=True)
  if nested and isinstance(data, Mapping):
    data = _flat(data)
  if not isinstance(data, Mapping):
    return data
  return {name: value.detach().numpy() if isinstance(value, torch.Tensor) else value for name, value in data.items()}


def _load(file: pathlib.Path, nested: bool) -> Any:  # noqa: FBT001
  with zipfile.ZipFile(file) as archive:
    _check_members(archive)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise UserError("not a PyTorch file: it has no data.pkl" if not pickles else "it has several data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
      raise UserError("its data.pkl is too large for a checkpoint: refused")
    data = _Unpickler(archive, root).load()
  if nested and isinstance(data, Mapping):
    data = _flat(data)
  if not isinstance(data, Mapping):
    return data
  tensors = [value for value in data.values() if isinstance(value, _Tensor)]
  if sum(math.prod(tensor.size) * tensor.values.itemsize for tensor in tensors) > _MAX_BYTES:
    raise UserError(f"its tensors take more than {_MAX_BYTES >> 30} GiB: refused")
  return {name: _array(value) if isinstance(value, _Tensor) else value for name, value in data.items()}


def _check_members(archive: zipfile.ZipFile) -> None:
  """Refuses archives that unpack to much more than their size."""
  members = archive.infolist()
  if sum(member.file_size for member in members) > _MAX_BYTES:
    raise UserError(f"it unpacks to more than {_MAX_BYTES >> 30} GiB: refused")
  for member in members:
    if member.compress_type == zipfile.ZIP_STORED:
      continue
    if member.file_size > _MAX_RATIO * member.compress_size + (1 << 20):
      raise UserError(f"its member {_short(member.filename)} unpacks to {member.file_size} bytes: refused")


# A pickle can create only tuples and objects without __dict__, and can refer to no class or function. So the BUILD
# instruction, which sets attributes, has nothing to modify.


class _Kind(NamedTuple):
  """Data type of a storage, by its name in torch."""

  name: str


class _Storage(NamedTuple):
  """The numbers of one storage, in the file's byte order."""

  values: np.ndarray


class _Tensor(NamedTuple):
  """A view of a storage, with checked bounds."""

  values: np.ndarray
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


class _Dictionary(dict[Any, Any]):
  """A dictionary that ignores attributes set by BUILD, such as `_metadata` of torch's state dictionaries."""

  __slots__ = ()

  def __setstate__(self, state: Any) -> None:
    pass


class _MakeDictionary:
  """Replaces `collections.OrderedDict`."""

  __slots__ = ()

  def __call__(self, *args: Any) -> _Dictionary:
    return _Dictionary(*args)


class _MakeTensor:
  """Replaces `torch._utils._rebuild_tensor_v2`."""

  __slots__ = ()

  def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    return _rebuild_tensor(storage, offset, size, stride)


class _Unpickler(pickle._Unpickler):
  """Unpickles tensors and dictionaries. Refuses every other global name, so that a pickle can call nothing.

  The base class is the unpickler in pure Python, since the one in C allocates as much memory as a number in the file
  requests. The instruction BYTEARRAY8 does so in the Python version too, and is therefore removed.
  """

  dispatch: ClassVar[dict[int, Any]] = {
    code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
  }

  def __init__(self, archive: zipfile.ZipFile, root: str):
    super().__init__(io.BytesIO(archive.read(root + "data.pkl")))
    self._archive, self._root = archive, root
    self._raw: dict[str, bytes] = {}
    names = archive.namelist()
    self._swapped = root + "byteorder" in names and archive.read(root + "byteorder") == b"big"

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return _MakeDictionary()
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _MakeTensor()
    if module == "torch" and name in _DTYPES:
      return _Kind(name)
    raise UserError(f"it refers to {_short(f'{module}.{name}')}, which a checkpoint does not need: refused")

  def persistent_load(self, pid: Any) -> _Storage:
    word, kind, key, _, count = pid
    if word != "storage" or not isinstance(kind, _Kind) or type(key) is not str or not _is_size(count):
      raise UserError("it refers to something that is not a storage: refused")
    if key not in self._raw:
      self._raw[key] = self._archive.read(f"{self._root}data/{key}")
    dtype = np.dtype(_DTYPES[kind.name]).newbyteorder(">" if self._swapped else "<")
    values = np.frombuffer(self._raw[key], dtype)
    if len(values) < count:
      raise UserError(f"storage {_short(key)} is truncated: {len(values)} of {count} numbers")
    return _Storage(values[:count])


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
  """Checks the bounds of a tensor and describes it.

  Strides must not reach outside the storage. A tensor must not have more numbers than its storage, as strides of 0
  would allow.
  """
  if not isinstance(storage, _Storage) or type(size) is not tuple or type(stride) is not tuple:
    raise UserError("it describes a malformed tensor")
  if len(size) != len(stride) or not all(_is_size(n) for n in (offset, *size, *stride)):
    raise UserError("it describes a tensor with negative or invalid numbers")
  values = storage.values
  if 0 not in size:
    if offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= len(values):
      raise UserError("it describes a tensor that reaches outside its storage")
    if math.prod(size) > len(values):
      raise UserError("it describes a tensor with more numbers than its storage")
  return _Tensor(values, offset, size, stride)


def _array(tensor: _Tensor) -> np.ndarray:
  """Copies a tensor from its storage to an array in native byte order."""
  values = tensor.values
  native = values.dtype.newbyteorder("=")
  if 0 in tensor.size:
    return np.zeros(tensor.size, native)
  strides = tuple(s * values.itemsize for s in tensor.stride)
  view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.size, strides, writeable=False)
  return view.astype(native, order="C")


def _is_size(value: Any) -> bool:
  return type(value) is int and value >= 0


def _short(name: str) -> str:
  """Formats a name from a file as one line of bounded length."""
  return repr(name[:100])
