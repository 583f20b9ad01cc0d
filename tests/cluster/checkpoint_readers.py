"""Readers of parameters, checkpoints and replay, and valid files of each."""

import json
import math
import pathlib
import shutil
import sys

from mutations import mutate_bytes, mutate_json, mutate_zip

SECONDS = 10
"""After which a reader counts as hanging."""
MEMORY = 2 << 30
"""Bytes of address space that a reader may take beyond what its libraries have."""
TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]


class Hang(BaseException):
  """No `Exception`, so that nothing on the way takes it for damage."""


class Reader:
  """One reader; its inputs are bytes, of which the first may choose a file.

  Args:
    folder: for the files that it reads.
  """

  def __init__(self, folder):
    self.folder = folder
    self.seeds = self.valid()

  def close(self):
    """Undoes changes of modules."""

  def put(self, name, data):
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def tiny_run(folder):
  """Writes the config.json of a run; returns the run."""
  from jedi_jax import config as config_lib
  from jedi_jax import envs
  from jedi_jax.runs import workdir

  config = config_lib.make_config(env="catch", preset="debug")
  return workdir.prepare(folder, config, envs.spec("catch"))


def save(folder, config, result):
  """Saves an agent with a result that was read, as `load_agent` and `Agent.save` do."""
  import numpy as np

  from jedi_jax import envs
  from jedi_jax.runs import sharing

  params, spec = {"bias": np.zeros(3, np.float32)}, envs.spec("catch")
  sharing.write(folder, params=params, config=config, spec=spec, sizes={"bias": 3}, result=result, overwrite=True)


class Diamond(Reader):
  """Checkpoints of DIAMOND, as import_diamond.py reads them."""

  def valid(self):
    import pytest
    import small_diamond
    import torch_writer

    from jedi_jax.interop import diamond, torch_file

    counterpart, seen = diamond._counterpart, {}

    def cached(config, spec):  # Tracing the networks is all that takes time.
      if len(seen) > 1000:
        seen.clear()
      if (config, spec) not in seen:
        seen[config, spec] = counterpart(config, spec)
      return seen[config, spec]

    self.patches = pytest.MonkeyPatch()
    self.patches.setattr(diamond, "_counterpart", cached)
    self.patches.setattr(torch_file, "_torch_is_safe", lambda: False)  # Not torch is tested.
    arrays = diamond.export_state_dict(small_diamond.random_params(), small_diamond.make_config(), small_diamond.SPEC)
    with pytest.MonkeyPatch.context() as patch:
      writer = torch_writer.Writer(self.folder, patch)
      files = [writer.save(arrays), writer.save(dict(list(arrays.items())[:3]))]
      seeds = [file.read_bytes() for file in files]
    for file in files:
      file.unlink()
    return seeds

  def mutate(self, pick, data):
    return mutate_zip(pick, data, lambda pick, name, content: mutate_bytes(pick, content))

  def close(self):
    self.patches.undo()

  def read(self, data):
    from jedi_jax.interop import diamond

    arrays = diamond.load(self.put("agent.pt", data))
    config, spec = diamond.infer(arrays, env="catch")
    diamond.import_params(arrays, config, spec)


class Shapes(Diamond):
  """State dictionaries of DIAMOND with other names, shapes and types: what comes after the file."""

  def valid(self):
    self.whole = super().valid()[0]
    from jedi_jax.interop import diamond

    arrays = diamond.load(self.put("agent.pt", self.whole))
    tree = [[name, value.dtype.name, list(value.shape)] for name, value in arrays.items()]
    return [json.dumps(tree).encode()]

  mutate = staticmethod(mutate_json)

  def read(self, data):
    import numpy as np

    from jedi_jax.interop import diamond

    arrays = {}
    try:
      for name, dtype, shape in json.loads(data):
        if math.prod(max(int(size), 1) for size in shape) < 1e7 and len(shape) < 9:
          arrays[str(name)] = np.zeros(shape, dtype)
    except Exception:
      return
    if all(value.dtype.kind in "biuf" for value in arrays.values()):  # What `load` can return.
      config, spec = diamond.infer(arrays, env="catch")
      diamond.import_params(arrays, config, spec)


class Checkpoint(Reader):
  """Files of checkpoints, as Orbax and then this library read them. An input is a file's number and its content."""

  def valid(self):
    import numpy as np

    from jedi_jax.runs import checkpoint

    self.like = {
      "params": {"layer": {"kernel": np.zeros((8, 9), np.float32)}, "bias": np.zeros(3, np.float32)},
      "state": {"frames": np.zeros(500, np.uint8), "count": np.zeros((), np.int32)},
    }
    self.whole = self.folder / "whole"
    checkpoints = checkpoint.Checkpoints(self.whole, keep=1)
    checkpoints.save(1, **self.like)
    checkpoints.close()
    self.files = sorted(p.relative_to(self.whole) for p in self.whole.rglob("*") if p.is_file())
    return [bytes([i]) + (self.whole / name).read_bytes() for i, name in enumerate(self.files)]

  def mutate(self, pick, data):
    return data[:1] + (mutate_bytes if pick.random() < 0.3 else mutate_json)(pick, data[1:])

  def read(self, data):
    from jedi_jax.runs import checkpoint

    copy = self.folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(self.whole, copy)
    (copy / self.files[data[0] % len(self.files) if data else 0]).write_bytes(data[1:])
    checkpoint.load_params(copy, self.like["params"])
    checkpoint.load_state(copy, "frames")


class Packed(Reader):
  """The packed arrays of a checkpoint, with checksums that fit; the index is JSON in them."""

  def valid(self):
    import numpy as np

    from jedi_jax.runs import checkpoint

    self.like = {"kernel": np.zeros((8, 9), np.float32), "bias": np.zeros(3, np.float32)}
    return [checkpoint._pack(checkpoint.flatten(self.like))["packed"].tobytes()]

  def mutate(self, pick, data):
    size = int.from_bytes(data[:8], "little")
    if pick.random() < 0.2 or size > len(data) - 8:
      return mutate_bytes(pick, data)
    index = mutate_json(pick, data[8 : 8 + size])
    return len(index).to_bytes(8, "little") + index + data[8 + size :]

  def read(self, data):
    import numpy as np

    from jedi_jax.runs import checkpoint

    packed = {"packed": np.frombuffer(data, np.uint8)}
    # As `_read` once Orbax has returned its arrays.
    arrays = checkpoint._verified(packed | {"crc32": checkpoint._checksums(packed)}, "params", "checkpoint 1 in x")
    checkpoint.unflatten(arrays, self.like, where="checkpoint 1 in x")


class Replay(Reader):
  """The replay in a checkpoint, as episodes are exported from it. An input is a list of names, dtypes and shapes."""

  def valid(self):
    from jedi_jax import replay as replay_lib
    from jedi_jax.runs import checkpoint

    self.run = tiny_run(self.folder / "run")
    shape = self.run.spec.observation_shape
    leaves = checkpoint.flatten(replay_lib.init(num_streams=2, slots_per_stream=8, observation_shape=shape))
    return [json.dumps([[name, value.dtype.name, list(value.shape), 0] for name, value in leaves.items()]).encode()]

  mutate = staticmethod(mutate_json)

  def read(self, data):
    import numpy as np
    import pytest

    from jedi_jax import datasets
    from jedi_jax import replay as replay_lib
    from jedi_jax.runs import checkpoint

    arrays = {}
    try:
      for name, dtype, shape, fill in json.loads(data):
        if math.prod(max(int(size), 1) for size in shape) < 1e6 and len(shape) < 9:
          arrays[str(name)] = np.full(shape, fill, dtype)
    except Exception:
      return
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(checkpoint, "newest", lambda _: 1)
      patch.setattr(checkpoint, "load_state", lambda *_: arrays)
      list(replay_lib.to_episodes(datasets.load_replay(self.run)))
