"""Files of named arrays in the format of safetensors (huggingface.co/docs/safetensors).

A file is the length of a header as 8 bytes, little-endian; the header, a JSON object from the name of each array to its
dtype, its shape and its place; and the bytes of the arrays, C-ordered and little-endian (as on all machines that JAX
supports), without gaps. The format is small enough to read and write without its package, so that shipped agents load
in every installation. The tests compare both directions with the package `safetensors`.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # A part of JAX's installation.
import numpy as np

from jedi_jax.errors import UserError

_DTYPES = {
  "BOOL": np.bool_,
  "U8": np.uint8,
  "I8": np.int8,
  "U16": np.uint16,
  "I16": np.int16,
  "U32": np.uint32,
  "I32": np.int32,
  "U64": np.uint64,
  "I64": np.int64,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F32": np.float32,
  "F64": np.float64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000
"""Largest header in bytes, as in the package."""
_MAX_SIZE, _MAX_DIMENSIONS = 2**50, 32


def encode(arrays: Mapping[str, Any]) -> bytes:
  """Returns the contents of a file.

  Args:
    arrays: by name; floating-point, integer or boolean, of any shape, in the machine's byte order.

  Raises:
    ValueError: for a dtype that the format does not have, or the reserved name '__metadata__'.
  """
  header: dict[str, Any] = {}
  chunks, start = [], 0
  # Larger elements first, so that every array is aligned.
  for name, value in sorted(arrays.items(), key=lambda item: (-np.asarray(item[1]).dtype.itemsize, item[0])):
    array = np.asarray(value)
    if name == _METADATA or array.dtype not in _NAMES:
      raise ValueError(f"array {name!r} of dtype {array.dtype} cannot be stored")
    data = array.tobytes()
    header[name] = {
      "dtype": _NAMES[array.dtype],
      "shape": list(array.shape),
      "data_offsets": [start, start + len(data)],
    }
    chunks.append(data)
    start += len(data)
  head = json.dumps(header, separators=(",", ":")).encode()
  head += b" " * (-len(head) % 8)
  return b"".join([len(head).to_bytes(8, "little"), head, *chunks])


def decode(data: bytes, path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the arrays of a file by name, read-only. Nothing in the file is executed.

  Args:
    data: the contents of the file.
    path: its path, for error messages.

  Raises:
    UserError: if the contents are not whole or not of this format.
  """
  length = int.from_bytes(data[:8], "little")
  if len(data) < 8 or length > min(len(data) - 8, _MAX_HEADER):
    raise UserError(f"{path} is no safetensors file, or is truncated: its header is not whole")
  body = memoryview(data)[8 + length :]
  try:
    header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_unique)
    if not isinstance(header, dict):
      raise TypeError(f"a {type(header).__name__} instead of an object")
    header.pop(_METADATA, None)
    places = {name: _place(name, entry) for name, entry in header.items()}
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise UserError(f"{path} has no valid header ({repr(error)[:200]})") from None
  end, arrays = 0, {}
  for name, (dtype, shape, start, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
    if start != end or stop > len(body):
      raise UserError(f"{path} is truncated or altered: the bytes of {name[:200]!r} are not where they should be")
    arrays[name], end = np.frombuffer(body[start:stop], dtype).reshape(shape), stop
  if end != len(body):
    raise UserError(f"{path} is altered: {len(body) - end} bytes belong to no array")
  return arrays


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Builds an object of a JSON text; refuses a repeated name, which readers may understand differently."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("a name is repeated")
  return found


def _place(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
  """Returns dtype, shape and place of an array, of which the length fits the shape."""
  if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"{name[:100]} has no dtype, shape and data_offsets")
  dtype, shape, offsets = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
  for numbers in (shape, offsets):
    if not isinstance(numbers, list) or not all(type(x) is int and x >= 0 for x in numbers):
      raise ValueError(f"{name[:100]} has a shape or data_offsets that are no lists of sizes")
  if math.prod(x or 1 for x in shape) > _MAX_SIZE or len(shape) > _MAX_DIMENSIONS:
    raise ValueError(f"{name[:100]} has a shape that NumPy does not allow")
  if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
    raise ValueError(f"{name[:100]} has data_offsets that do not fit its shape")
  return dtype, tuple(shape), offsets[0], offsets[1]
