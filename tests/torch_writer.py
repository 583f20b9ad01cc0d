"""Writes `.pt` files as torch does, without torch."""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np

STORAGES = {
  "float32": "FloatStorage",
  "float64": "DoubleStorage",
  "float16": "HalfStorage",
  "int64": "LongStorage",
  "int32": "IntStorage",
  "uint8": "ByteStorage",
  "bool": "BoolStorage",
}


def _rebuild_tensor_v2(*args):
  raise AssertionError("only its name is written")


_rebuild_tensor_v2.__module__ = "torch._utils"
TORCH, UTILS = types.ModuleType("torch"), types.ModuleType("torch._utils")
UTILS._rebuild_tensor_v2 = _rebuild_tensor_v2
for _name in STORAGES.values():
  setattr(TORCH, _name, type(_name, (), {"__module__": "torch"}))


class Storage:
  """Raw numbers in the archive; `claimed` is how many the pickle says there are."""

  def __init__(self, values, claimed=None):
    self.values = np.ascontiguousarray(values).reshape(-1)
    self.claimed = self.values.size if claimed is None else claimed


class Tensor:
  """A view of a storage; written whatever its numbers are."""

  def __init__(self, storage, offset, size, stride):
    self.args = (storage, offset, size, stride)

  def __reduce__(self):
    return _rebuild_tensor_v2, (*self.args, False, collections.OrderedDict())


class _Pickler(pickle.Pickler):
  def __init__(self, file):
    super().__init__(file, protocol=2)
    self.keys = {}

  def persistent_id(self, obj):
    if not isinstance(obj, Storage):
      return None
    key = self.keys.setdefault(obj, str(len(self.keys)))
    return "storage", getattr(TORCH, STORAGES[obj.values.dtype.name]), key, "cpu", obj.claimed


class Writer:
  """Makes files in a directory."""

  Storage, Tensor = Storage, Tensor

  def __init__(self, directory, monkeypatch):
    self._directory, self._monkeypatch, self._count = directory, monkeypatch, 0

  def tensor(self, array):
    """A contiguous tensor with a storage of its own."""
    array = np.asarray(array)
    strides = [int(s) for s in np.cumprod([1, *array.shape[:0:-1]])[::-1]] if array.ndim else []
    return Tensor(Storage(array), 0, array.shape, tuple(strides))

  def archive(self, data, storages=None, *, compression=zipfile.ZIP_STORED, name="data.pkl", extra=None):
    """A zip of any bytes as the pickle."""
    path = self._directory / f"file_{self._count}.pt"
    self._count += 1
    with zipfile.ZipFile(path, "w", compression) as archive:
      archive.writestr(f"agent/{name}", data)
      for key, raw in {**{f"data/{k}": v for k, v in (storages or {}).items()}, **(extra or {})}.items():
        archive.writestr(f"agent/{key}", raw)
    return path

  def write(self, obj, **options):
    """What torch.save writes for an object made of `Tensor`s."""
    file = io.BytesIO()
    with self._monkeypatch.context() as patch:
      patch.setitem(sys.modules, "torch", TORCH)
      patch.setitem(sys.modules, "torch._utils", UTILS)
      pickler = _Pickler(file)
      pickler.dump(obj)
    return self.archive(file.getvalue(), {k: s.values.tobytes() for s, k in pickler.keys.items()}, **options)

  def save(self, arrays):
    """A state dictionary of contiguous tensors."""
    return self.write(collections.OrderedDict((name, self.tensor(value)) for name, value in arrays.items()))


STEPS = 5
"""Of `diamond_episode`."""


def diamond_episode(pt, *, final=True, ends=True, **changes):
  """An episode as DIAMOND saves it, whose frame t is t everywhere."""
  frames = np.broadcast_to(np.arange(STEPS + 1, dtype=np.uint8)[:, None, None, None], (STEPS + 1, 3, 8, 7))
  flags = np.zeros(STEPS, np.uint8)
  last = flags.copy()
  last[-1] = 1
  arrays = {
    "obs": frames[:-1], "act": np.arange(STEPS), "rew": np.arange(STEPS, dtype=np.float32),
    "end": last if ends else flags, "trunc": flags if ends else last, **changes,
  }  # fmt: skip
  info = {"final_observation": pt.tensor((frames[-1] / 255 * 2 - 1).astype(np.float32))} if final else {}
  return pt.write({**{name: pt.tensor(x) for name, x in arrays.items()}, "info": info})
