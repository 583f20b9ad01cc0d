"""The reader of `.pt` files: what torch writes, and what nobody should."""

import collections
import importlib.metadata
import pathlib
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest

from jedi_jax.errors import UserError
from jedi_jax.interop import torch_file
from jedi_jax.interop.torch_file import load_arrays

DATA = pathlib.Path(__file__).parents[1] / "data"
RANDOM = np.random.default_rng(0)


def refused(path, match=None):
  with pytest.raises(UserError, match=match) as error:
    load_arrays(path)
  assert len(str(error.value).splitlines()) == 1
  assert len(str(error.value)) < 400 + len(str(path))


def same(actual, expected):
  assert list(actual) == list(expected)
  for name, value in expected.items():
    assert isinstance(actual[name], np.ndarray)
    assert actual[name].dtype == np.asarray(value).dtype, name
    assert actual[name].shape == np.shape(value), name
    np.testing.assert_array_equal(actual[name], value, err_msg=name)


def text(value):
  return b"X" + struct.pack("<I", len(value)) + value


def test_file_that_torch_wrote(pt):
  """torch_saved.pt is what torch.save of PyTorch 2.13 wrote of torch_saved.npz; it is a module's state dictionary."""
  expected = np.load(DATA / "torch_saved.npz")
  arrays = load_arrays(DATA / "torch_saved.pt")
  same(arrays, {name: expected[name] for name in expected.files})
  assert arrays["view"].shape == (5, 2)
  assert all(value.flags.writeable for value in arrays.values())


def test_round_trip(pt):
  base = RANDOM.standard_normal(24).astype(np.float32)
  storage = pt.Storage(base)
  bytes_ = pt.Storage(np.arange(16, dtype=np.uint8))
  expected = collections.OrderedDict(
    contiguous=base.reshape(2, 3, 4),
    transposed=base[:12].reshape(3, 4).T,
    offset=base[5:11].reshape(2, 3),
    every_other=base[1::2],
    scalar=np.asarray(base[7]),
    empty=np.zeros((0, 3), np.float32),
    integers=np.arange(6).reshape(2, 3) - 3,
    flags=np.asarray([True, False]),
    half=np.asarray([1.5, -2], np.float16),
    double=np.asarray([[np.pi, np.nan, -np.inf]]),
    shared=np.arange(16, dtype=np.uint8),
  )
  tensors = collections.OrderedDict((name, pt.tensor(value)) for name, value in expected.items())
  tensors["contiguous"] = pt.Tensor(storage, 0, (2, 3, 4), (12, 4, 1))
  tensors["transposed"] = pt.Tensor(storage, 0, (4, 3), (1, 4))
  tensors["offset"] = pt.Tensor(storage, 5, (2, 3), (3, 1))
  tensors["every_other"] = pt.Tensor(storage, 1, (12,), (2,))
  tensors["scalar"] = pt.Tensor(storage, 7, (), ())
  tensors["empty"] = pt.Tensor(storage, 0, (0, 3), (3, 1))
  tensors["shared"] = pt.Tensor(bytes_, 0, (16,), (1,))
  same(load_arrays(pt.write(tensors)), expected)
  same(load_arrays(pt.write(dict(tensors))), expected)  # A plain dictionary too.
  same(load_arrays(pt.write(tensors, compression=zipfile.ZIP_DEFLATED)), expected)


def test_several_types_share_a_storage(pt):
  raw = np.arange(16, dtype=np.uint8).tobytes()

  def entry(name, kind, count, size):
    pid = b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + text(b"0") + text(b"cpu") + bytes([75, count]) + b"tQ"
    return text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K\x00K" + size + b"\x85K\x01\x85\x89}tR"

  data = b"\x80\x02}(" + entry(b"i", b"IntStorage", 4, b"\x04") + entry(b"f", b"FloatStorage", 4, b"\x02") + b"u."
  same(
    load_arrays(pt.archive(data, {"0": raw})),
    {"i": np.frombuffer(raw, np.int32), "f": np.frombuffer(raw, np.float32)[:2]},
  )


def test_big_endian(pt):
  values = np.asarray([1, 2, 3], np.int32)
  path = pt.write({"x": pt.tensor(values)}, extra={"byteorder": b"big"})
  same(load_arrays(path), {"x": values.byteswap()})


def test_truncated(pt):
  whole = pt.save({"x": np.arange(50.0)}).read_bytes()
  for length in (0, 1, 4, 30, 100, len(whole) // 2, len(whole) - 22, len(whole) - 1):
    path = pt.archive(b"")
    path.write_bytes(whole[:length])
    refused(path)


def test_flipped_bytes(pt):
  """Every flipped byte is refused, or is one that does not matter."""
  arrays = {"x": np.arange(5.0)}
  path = pt.save(arrays)
  whole = path.read_bytes()
  data = {bytes(np.arange(5.0)), b"_rebuild_tensor_v2"}
  refusals = 0
  for position in range(len(whole)):
    path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :])
    try:
      actual = load_arrays(path)
    except UserError:
      refused(path)
      refusals += 1
    else:
      same(actual, arrays)
      assert not any(whole.index(part) <= position < whole.index(part) + len(part) for part in data)
  assert refusals > len(whole) // 3


def test_not_such_a_file(pt, tmp_path):
  refused(tmp_path / "absent.pt", "is not a file")
  refused(tmp_path, "is not a file")
  for content in (b"", b"no archive", pickle.dumps({}), b"PK\x03\x04"):
    (tmp_path / "x.pt").write_bytes(content)
    refused(tmp_path / "x.pt", "not a readable PyTorch file")
  refused(pt.archive(b"}.", name="other.pkl"), "has no data.pkl")
  refused(pt.archive(b"}.", extra={"b/data.pkl": b"}."}), "several data.pkl")
  for data in (b"", b".", b"garbage", b"\x80\x02}", b"\x80\xff}.", b"(" * 1000, b"0" * 10, b"\x80\x02\x8a\xff."):
    refused(pt.archive(data), "not a readable PyTorch file")


def test_contents_that_are_no_tensors(pt):
  for value in (3, "text", None, [1], {"nested": pt.tensor(np.zeros(2))}, np.float32):
    refused(
      pt.write({"fine": pt.tensor(np.zeros(2)), "odd": value})
      if value is not np.float32
      else pt.write({"odd": pt.Storage(np.zeros(2))}),
      "at 'odd', not a tensor",
    )
  refused(pt.write({3: pt.tensor(np.zeros(2))}), "holds a int where the name")
  refused(pt.write({("a\n" * 9,): pt.tensor(np.zeros(2))}), "holds a tuple where the name")
  refused(pt.write({"a\nb" * 999: 1}), "not a tensor")
  for value in (3, "text", None, [pt.tensor(np.zeros(2))], pt.tensor(np.zeros(2))):
    refused(pt.write(value), "not a dictionary of tensors")


FORBIDDEN = [
  ("os", "system"),
  ("posix", "system"),
  ("subprocess", "call"),
  ("builtins", "eval"),
  ("builtins", "exec"),
  ("builtins", "getattr"),
  ("builtins", "__import__"),
  ("__builtin__", "eval"),
  ("torch", "load"),
  ("torch.serialization", "load"),
  ("torch._utils", "_rebuild_tensor"),
  ("torch", "FloatStorage.__init__"),
  ("collections", "OrderedDict.__class__"),
  ("collections", "namedtuple"),
  ("numpy.core.multiarray", "_reconstruct"),
  ("numpy", "fromfile"),
  ("copyreg", "_reconstructor"),
  ("jedi_jax.interop.torch_file", "_Unpickler"),
  ("a\\nb", "c\\nd"),
]


@pytest.mark.parametrize(("module", "name"), FORBIDDEN, ids=".".join)
def test_nothing_else_can_be_named(pt, tmp_path, module, name):
  sentinel = tmp_path / "sentinel"
  module, name = module.encode().replace(b"\\n", b"\n"), name.encode().replace(b"\\n", b"\n")
  argument = text(b"touch " + bytes(sentinel) if name == b"system" else b"open(%r, 'w')" % str(sentinel))
  pickles = [b"\x80\x04" + text(module) + text(name) + b"\x93" + argument + b"\x85R."]
  if b"\n" not in module:
    pickles.append(b"\x80\x02c" + module + b"\n" + name + b"\n" + argument + b"\x85R.")
    pickles.append(b"(" + argument + b"i" + module + b"\n" + name + b"\n.")
    pickles.append(b"\x80\x02(c" + module + b"\n" + name + b"\n" + argument + b"o.")
  for data in pickles:
    refused(pt.archive(data), "refused")
  assert not sentinel.exists()


GLOBALS = (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n")


@pytest.mark.parametrize("target", GLOBALS, ids=["function", "storage", "dictionary"])
@pytest.mark.parametrize("attribute", [b"__call__", b"__code__", b"__class__", b"__dict__", b"name", b"x"])
def test_build_changes_nothing(pt, target, attribute):
  good = pt.save({"x": np.arange(3.0)})
  modules = {name: dict(vars(sys.modules[name])) for name in ("collections", torch_file.__name__)}
  classes = [value for value in vars(torch_file).values() if isinstance(value, type)]
  before = [dict(vars(cls)) for cls in classes]
  state = b"}" + text(attribute) + b"K\x01s"
  for change in (state, b"N" + state + b"\x86", state + state + b"\x86"):
    refused(pt.archive(b"\x80\x02" + target + change + b"b."))
  # NEWOBJ, which calls __new__.
  refused(pt.archive(b"\x80\x02" + target + b")\x81."))
  assert {name: dict(vars(sys.modules[name])) for name in modules} == modules
  assert [dict(vars(cls)) for cls in classes] == before
  same(load_arrays(good), {"x": np.arange(3.0)})


def test_build_cannot_replace_a_tensor(pt):
  storage = b"(" + text(b"storage") + b"ctorch\nByteStorage\n" + text(b"0") + text(b"cpu") + b"K\x04tQ"
  tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x04\x85K\x01\x85\x89}tR"
  for value in (storage, tensor):
    for state in (b"}" + text(b"size") + b"K\x01s", b"N}" + text(b"values") + b"K\x01s\x86", b"(K\x01K\x02K\x03K\x04t"):
      refused(pt.archive(b"\x80\x02}" + text(b"x") + value + state + b"bs.", {"0": b"1234"}))


def test_attributes_of_the_dictionary_are_ignored(pt):
  """torch's own state dictionaries have `_metadata`; methods must not be overlaid by others."""
  state = b"}(" + text(b"_metadata") + b"}" + text(b"items") + b"K\x01" + text(b"keys") + b"K\x01u"
  assert load_arrays(pt.archive(b"\x80\x02ccollections\nOrderedDict\n)R" + state + b"b.")) == {}


@pytest.mark.parametrize(
  ("offset", "size", "stride", "match"),
  [
    (0, (13,), (1,), "outside"),
    (1, (12,), (1,), "outside"),
    (0, (3, 4), (5, 1), "outside"),
    (12, (), (), "outside"),
    (10**30, (1,), (1,), "outside"),
    (0, (2,), (10**30,), "outside"),
    (11, (4,), (-1,), "negative"),
    (-1, (2,), (1,), "negative"),
    (0, (-2, -2), (1, 1), "negative"),
    (0, (True,), (1,), "invalid numbers"),
    (0, (2.0,), (1,), "invalid numbers"),
    (0, (2,), (None,), "invalid numbers"),
    ("0", (2,), (1,), "invalid numbers"),
    (0, (2, 2), (1,), "invalid numbers"),
    (0, [2], [1], "malformed"),
    (0, (10**12,), (0,), "more numbers"),
    (0, (10**6, 10**6, 2), (0, 0, 1), "more numbers"),
    (0, (4, 4), (1, 1), "more numbers"),
    (0, (1,) * 100, (1,) * 100, "not a readable"),
    (0, (0, 2**62, 2**62), (1, 1, 1), "not a readable"),
  ],
)
def test_tensors_outside_of_their_storage(pt, offset, size, stride, match):
  storage = pt.Storage(np.arange(12.0))
  refused(pt.write({"x": pt.Tensor(storage, offset, size, stride)}), match)


def test_storages_that_make_no_sense(pt):
  refused(pt.write({"x": pt.Tensor(pt.Storage(np.zeros(4), claimed=5), 0, (2,), (1,))}), "truncated")
  refused(pt.write({"x": pt.Tensor(pt.Storage(np.zeros(4), claimed=2), 0, (3,), (1,))}), "outside")
  for claimed in (-1, 2.5, None, "4", True):
    storage = pt.Storage(np.zeros(4))
    storage.claimed = claimed
    refused(pt.write({"x": pt.Tensor(storage, 0, (2,), (1,))}), "not a storage")
  refused(pt.write({"x": pt.Tensor("storage", 0, (2,), (1,))}), "malformed")
  for pid in (b"N", b"K\x01", b")", text(b"storage"), b"(" + text(b"module") + b"NNNNt", b"(" + b"N" * 5 + b"t"):
    refused(pt.archive(b"\x80\x02" + pid + b"Q."))
  key = b"(" + text(b"storage") + b"ctorch\nByteStorage\n" + text(b"../data.pkl") + text(b"cpu") + b"K\x04tQ."
  refused(pt.archive(b"\x80\x02" + key))


def test_bombs(pt, monkeypatch):
  zeros = {"x": np.zeros(1 << 20)}
  path = pt.write({"x": pt.tensor(zeros["x"])}, compression=zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 1 << 14
  refused(path, "unpacks to")
  # A huge index of the memo, and lengths beyond the file: Python's unpickler in C reserves the memory that they name.
  assert load_arrays(pt.archive(b"\x80\x02}r\xff\xff\xff\x7f.")) == {}
  for data in (
    b"\x80\x05\x96" + b"\x00" * 4 + b"\x10\x00\x00\x00.",
    b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00.",
    b"\x80\x04\x8d" + b"\xff" * 7 + b"\x00.",
    b"\x80\x02\x8b\xff\xff\xff\x7f.",
  ):
    refused(pt.archive(data), "not a readable")
  # Many tensors of one storage.
  storage = pt.Storage(np.zeros(500))
  path = pt.write({str(i): pt.Tensor(storage, 0, (500,), (1,)) for i in range(50)})
  assert len(load_arrays(path)) == 50
  monkeypatch.setattr(torch_file, "_MAX_BYTES", 30_000)
  refused(path, "its tensors take more")
  monkeypatch.setattr(torch_file, "_MAX_BYTES", 1_000)
  refused(path, "unpacks to more")


@pytest.mark.parametrize(
  ("version", "safe"),
  [(None, False), ("1.13.1", False), ("2.5.1+cu121", False), ("2.6.0", True), ("2.13.0a0", True), ("odd", False)],
)
def test_unsafe_versions_of_torch_are_not_used(monkeypatch, version, safe):
  def of(name):
    assert name == "torch"
    if version is None:
      raise importlib.metadata.PackageNotFoundError(name)
    return version

  monkeypatch.setattr(importlib.metadata, "version", of)
  assert torch_file._torch_is_safe() is safe
  if not safe:
    monkeypatch.setitem(sys.modules, "torch", None)  # An import would fail.
    assert "view" in load_arrays(DATA / "torch_saved.pt")
