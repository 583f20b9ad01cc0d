"""Random damage to the files of a checkpoint."""

import shutil

import jax
import numpy as np
import pytest

from jedi_jax.errors import UserError
from jedi_jax.runs import checkpoint
from jedi_jax.runs.checkpoint import Checkpoints

LIKE = {
  "params": {f"layer_{i}": {"kernel": np.zeros((8, 8 + i), np.float32)} for i in range(4)},
  "state": {"frames": np.zeros(5_000, np.uint8), "count": np.zeros((), np.int32)},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Saves noise as checkpoint 1; returns its directory and arrays. The frames are stored separately."""
  generator = np.random.default_rng(0)
  trees = jax.tree.map(lambda x: np.asarray(generator.integers(200, size=x.shape)).astype(x.dtype), LIKE)
  directory = tmp_path_factory.mktemp("checkpoints") / "latest"
  checkpoints = Checkpoints(directory, keep=1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint, "_LARGE", 5_000)
    checkpoints.save(1, **trees)
  checkpoints.close()
  return directory, trees


def harms(generator, files, count):
  """Yields (file name, function of its bytes that returns damaged bytes, or None to delete the file)."""

  def flip(data):
    data = bytearray(data)
    data[generator.integers(len(data))] ^= 1 << generator.integers(8)
    return bytes(data)

  kinds = [
    flip,
    lambda data: data[: generator.integers(len(data))],
    lambda data: None,
    lambda data: generator.bytes(len(data)),
    lambda data: data + generator.bytes(10),
  ]
  for i in range(count):
    yield files[generator.integers(len(files))], kinds[0 if i % 2 else i // 2 % len(kinds)]


def attempt(checkpoints):
  """Returns (restored checkpoint, None) or (None, error message)."""
  try:
    return checkpoints.restore_newest(**LIKE, log=pytest.fail), None
  except UserError as error:
    return None, str(error)


@pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.faults)])
def test_a_damaged_checkpoint_restores_exactly_or_is_refused(tmp_path, whole, count):
  directory, trees = whole
  files = [p.relative_to(directory) for p in sorted(directory.rglob("*")) if p.is_file() and p.stat().st_size]
  outcomes = {"read": 0, "refused": 0}
  for number, (name, harm) in enumerate(harms(np.random.default_rng(count), files, count)):
    copy = tmp_path / str(number) / "latest"
    shutil.copytree(directory, copy)
    damaged = harm((copy / name).read_bytes())
    (copy / name).unlink() if damaged is None else (copy / name).write_bytes(damaged)
    checkpoints = Checkpoints(copy, keep=1)
    restored, refusal = attempt(checkpoints)
    if refusal is None:  # The damage is in redundant bytes.
      jax.tree.map(np.testing.assert_array_equal, {"params": restored.params, "state": restored.state}, trees)
      outcomes["read"] += 1
    else:
      assert "\n" not in refusal
      assert "checkpoint 1" in refusal
      outcomes["refused"] += 1
    checkpoints.close()
    shutil.rmtree(copy.parent)
  print(outcomes)
  assert outcomes["refused"] >= count / 10  # Most files are small and redundant.
