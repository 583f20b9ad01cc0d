import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from refusals import refused

from jedi_jax.errors import UserError
from jedi_jax.runs.safetensors import decode, encode

PATH = pathlib.Path("model.safetensors")
GENERATOR = np.random.default_rng(0)
ARRAYS = {
  "encoder/kernel": GENERATOR.normal(size=(3, 3, 2, 4)).astype(np.float32),
  "encoder/count": np.asarray(7, np.int32),
  "empty": np.zeros((0, 3), np.float16),
  "mask": np.asarray([True, False, True]),
  "image": GENERATOR.integers(256, size=(5, 3), dtype=np.uint8).T,  # Not C-ordered.
  "wide": np.asarray([1.5, -2.5]),
}


def same(found, expected):
  assert set(found) == set(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name], array, strict=True)


def file(header, body=b""):
  head = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(head).to_bytes(8, "little") + head + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_is_written_is_read():
  arrays = ARRAYS | {"half": np.asarray([1.5, 2.0], ml_dtypes.bfloat16)}
  same(decode(encode(arrays), PATH), arrays)
  same(decode(encode({}), PATH), {})


def test_the_package_reads_and_writes_the_same():
  package = pytest.importorskip("safetensors.numpy")
  same(package.load(encode(ARRAYS)), ARRAYS)
  contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in ARRAYS.items()}
  same(decode(package.save(contiguous, metadata={"format": "np"}), PATH), ARRAYS)


def test_arrays_are_aligned():
  data = encode(ARRAYS)
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
  for name, place in header.items():
    assert place["data_offsets"][0] % ARRAYS[name].dtype.itemsize == 0
  assert int.from_bytes(data[:8], "little") % 8 == 0


@pytest.mark.parametrize("array", [np.zeros(2, np.complex64), np.asarray(["text"]), np.asarray([None])])
def test_other_dtypes_are_not_written(array):
  with pytest.raises(ValueError, match="cannot be stored"):
    encode({"x": array})


BROKEN = {
  "nothing": b"",
  "no length": b"\x01\x00",
  "a long header": (2**63).to_bytes(8, "little") + b"{}",
  "no JSON": file(b"{"),
  "no UTF-8": file(b'{"\xff": 1}'),
  "a list": file([]),
  "deep JSON": file(b"[" * 100_000),
  "an entry that is a number": file({"x": 3}),
  "an unknown dtype": file({"x": entry("F128")}, bytes(8)),
  "a dtype that is a list": file({"x": entry() | {"dtype": ["F32"]}}, bytes(8)),
  "no shape": file({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
  "a negative size": file({"x": entry(shape=(-1, -2))}, bytes(8)),
  "a size that is no integer": file({"x": entry(shape=(2.0,))}, bytes(8)),
  "a size that is true": file({"x": entry(shape=(True, 2))}, bytes(8)),
  "a huge shape": file({"x": entry(shape=(0, 2**70), offsets=(0, 0))}),
  "many dimensions": file({"x": entry(shape=[1] * 99, offsets=(0, 4))}, bytes(4)),
  "bytes that do not fit": file({"x": entry(shape=(3,))}, bytes(8)),
  "three offsets": file({"x": entry(offsets=(0, 8, 8))}, bytes(8)),
  "bytes beyond the end": file({"x": entry()}, bytes(7)),
  "bytes of no array": file({"x": entry()}, bytes(9)),
  "a gap": file({"x": entry(), "y": entry(offsets=(9, 17))}, bytes(17)),
  "an overlap": file({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)),
  "a repeated name": file(b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":3}'),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line(data):
  refused(lambda: decode(data, PATH), "model.safetensors")


def problem(data):
  """The message with which a file is refused, or None."""
  try:
    decode(data, PATH)
  except UserError as error:
    return str(error)
  return None


def test_every_truncation_is_refused_and_no_alteration_is_a_traceback():
  data = encode({"x": np.arange(3, dtype=np.float32), "y": np.asarray([True])})
  assert problem(data) is None
  assert all("model.safetensors" in problem(data[:size]) for size in range(len(data)))
  flips = [(place, change) for place in range(len(data)) for change in (1, 0x20, 0x80)]
  found = [problem(data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]) for place, change in flips]
  assert None in found  # A name or a value has changed: the checksum of a saved agent tells.
  assert all("\n" not in message for message in found if message)
  assert sum(message is not None for message in found) > len(flips) / 2
