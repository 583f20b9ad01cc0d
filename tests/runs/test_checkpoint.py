import logging
import shutil
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from refusals import refused

from jedi_jax.runs import checkpoint
from jedi_jax.runs.checkpoint import Checkpoints, SaveError, load_params


class Pair(NamedTuple):
  left: np.ndarray
  right: dict


def params():
  return {"net": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.float32([0.5, -np.inf, np.nan])}}


def odd():
  """Scalars, all dtypes of a run, tuples, named tuples, lists, empty nodes."""
  return {
    "scalar": np.asarray(7, np.int32),
    "double": np.asarray([1.0 + 2**-50, -np.inf]),
    "flags": np.array([True, False]),
    "frames": np.arange(24, dtype=np.uint8).reshape(1, 2, 3, 4),
    "key": np.array([1, 2**32 - 1], np.uint32),
    "pair": Pair(np.ones(2, np.float32), {"deep": (np.zeros(1, np.int64), None, [np.asarray(3.0, np.float32)])}),
    "empty": np.zeros((0, 3), np.float32),
    "nothing": {},
    "none": None,
  }


def shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert isinstance(x, np.ndarray)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A directory with checkpoint 3 of `params` and `odd`."""
  directory = tmp_path_factory.mktemp("checkpoints") / "latest"
  checkpoints = Checkpoints(directory, keep=2)
  checkpoints.save(3, params=params(), state=odd())
  checkpoints.close()
  return directory


def test_round_trip_of_odd_trees(saved):
  checkpoints = Checkpoints(saved, keep=2)
  assert checkpoints.latest() == 3
  got_params, got_state = checkpoints.restore(3, params=shapes(params()), state=shapes(odd()))
  checkpoints.close()
  assert_same(got_params, params())
  assert_same(got_state, odd())


@pytest.mark.parametrize("large", [1, 16])
def test_round_trip_of_large_arrays(tmp_path, monkeypatch, large):
  monkeypatch.setattr(checkpoint, "_LARGE", large)
  checkpoints = Checkpoints(tmp_path, keep=2)
  state = {**odd(), "large/array": np.arange(1_000)}
  checkpoints.save(1, params=params(), state=state)
  checkpoints.wait()
  got_params, got_state = checkpoints.restore(1, params=shapes(params()), state=shapes(state))
  checkpoints.close()
  assert_same(got_params, params())
  assert_same(got_state, state)


def test_all_arrays_can_be_read_by_name(saved, tmp_path):
  arrays = checkpoint.read(saved, 3)
  assert len(arrays) == len(jax.tree.leaves((params(), odd())))
  np.testing.assert_array_equal(arrays["params/net/kernel"], params()["net"]["kernel"])
  np.testing.assert_array_equal(arrays["state/pair/right/deep/0"], [0])
  refused(lambda: checkpoint.read(saved, 4), "checkpoint 4")
  refused(lambda: checkpoint.read(tmp_path / "none", 4), "checkpoint 4")


def test_arrays_of_another_byte_order_are_not_stored(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  with pytest.raises(ValueError, match="byte order"):
    checkpoints.save(1, params={"x": np.zeros(2, np.dtype(np.float32).newbyteorder())})
  checkpoints.close()


def test_parameters_alone_can_be_loaded(saved):
  before = sorted(p for p in saved.rglob("*"))
  assert_same(load_params(saved, shapes(params()))[0], params())
  assert sorted(p for p in saved.rglob("*")) == before


def test_the_newest_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path / "some" / "where", keep=2)
  assert checkpoints.latest() is None
  for number in (1, 2, 5):
    checkpoints.save(number, params={"x": np.full(3, number, np.float32)})
  checkpoints.save(5, params={"x": np.zeros(3, np.float32)})  # It exists: nothing is saved.
  checkpoints.wait()
  assert checkpoints.latest() == 5
  checkpoints.close()
  assert sorted(p.name for p in (tmp_path / "some" / "where").iterdir()) == ["2", "5"]
  like = {"x": jax.ShapeDtypeStruct((3,), np.float32)}
  np.testing.assert_array_equal(load_params(tmp_path / "some" / "where", like)[0]["x"], np.full(3, 5))


@pytest.mark.parametrize(
  ("change", "parts"),
  [
    (lambda p: p["net"].update(gain=np.ones(1, np.float32)), ["lacks", "net/gain"]),
    (lambda p: p["net"].pop("bias"), ["unknown", "net/bias"]),
    (lambda p: p["net"].update(bias=np.ones(4, np.float32)), ["net/bias", "[3]", "[4]"]),
    (lambda p: p["net"].update(bias=np.ones(3, np.float16)), ["net/bias", "float32", "float16"]),
  ],
)
def test_checkpoints_that_do_not_fit_are_refused(saved, change, parts):
  like = params()
  change(like)
  refused(lambda: load_params(saved, shapes(like)), "does not fit", "checkpoint 3", *parts)


def test_a_state_that_does_not_fit_is_refused(saved):
  checkpoints = Checkpoints(saved, keep=2)
  like = odd() | {"scalar": np.asarray(7.0, np.float32)}
  refused(lambda: checkpoints.restore(3, params=params(), state=shapes(like)), "scalar", "int32", "float32")
  refused(lambda: checkpoints.restore(4, params=params(), state=odd()), "checkpoint 4", "cannot be read")
  checkpoints.close()


def test_a_checkpoint_without_a_state_cannot_be_resumed(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, params=params())
  checkpoints.wait()
  refused(lambda: checkpoints.restore(1, params=params(), state=odd()), "checkpoint 1")
  checkpoints.close()


def test_no_checkpoint(tmp_path):
  refused(lambda: load_params(tmp_path / "missing", shapes(params())), "no checkpoint", str(tmp_path / "missing"))
  refused(lambda: load_params(tmp_path, shapes(params())), "no checkpoint", str(tmp_path))
  assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, how):
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(1, params=params())
  checkpoints.close()
  for file in (tmp_path / "c" / "1" / "params").rglob("*"):
    if file.is_file():
      if how == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
      else:
        file.unlink()
  refused(lambda: load_params(tmp_path / "c", shapes(params())), "checkpoint 1", "cannot be read")


def truncate(path):
  for file in (path / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(path):
  """Flips a bit of the largest file, the data, which the storage layer reads without an error."""
  largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 0x10
  largest.write_bytes(data)


def remove_one(path):
  (path / "params" / "_METADATA").unlink()
  (path / "params" / "manifest.ocdbt").unlink()


def empty(path):
  shutil.rmtree(path)
  path.mkdir()


def replace(path):
  """Replaces a checkpoint by one of another configuration."""
  shutil.rmtree(path)
  other = Checkpoints(path.parent.with_name("other"), keep=9)
  other.save(int(path.name), params={"net": {"kernel": np.zeros((3, 3), np.float32)}}, state=odd())
  other.close()
  (path.parent.with_name("other") / path.name).rename(path)


NOISE = np.random.default_rng(0).integers(256, size=100_000, dtype=np.uint8)


def numbered_state(number):
  return {"number": np.asarray(number, np.int32), "noise": NOISE}


def numbered(directory, *numbers):
  """Saves checkpoints whose states hold their number; most bytes are noise."""
  checkpoints = Checkpoints(directory, keep=9)
  for number in numbers:
    checkpoints.save(number, params=params(), state=numbered_state(number))
  checkpoints.close()


LIKE = {"params": shapes(params()), "state": shapes(numbered_state(0))}


@pytest.mark.parametrize("harm", [truncate, flip, remove_one, empty, replace])
def test_the_newest_valid_checkpoint_is_used_and_damaged_ones_are_moved(tmp_path, harm):
  numbered(tmp_path / "latest", 2, 4, 6)
  for number in ("4", "6"):
    harm(tmp_path / "latest" / number)
  checkpoints, logged = Checkpoints(tmp_path / "latest", keep=9), []
  restored = checkpoints.restore_newest(**LIKE, log=logged.append)
  assert restored.number == restored.state["number"] == 2
  assert_same(restored.params, params())
  assert [f"checkpoint {number}" in line for number, line in zip("64", logged, strict=True)] == [True, True]
  assert all("\n" not in line and "checkpoint 2 is used" in line for line in logged)
  assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["latest_4", "latest_6"]
  # A resumed run saves the same numbers again.
  assert checkpoints.latest() == 2
  checkpoints.save(4, params=params(), state=numbered_state(40))
  checkpoints.wait()
  restored = checkpoints.restore_newest(**LIKE, log=logged.append)
  assert (restored.number, int(restored.state["number"]), len(logged)) == (4, 40, 2)
  checkpoints.close()


@pytest.mark.parametrize("harm", [truncate, flip, remove_one, empty, replace])
def test_nothing_is_changed_without_a_valid_checkpoint(tmp_path, harm):
  numbered(tmp_path / "latest", 2, 4)
  for number in ("2", "4"):
    harm(tmp_path / "latest" / number)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  checkpoints = Checkpoints(tmp_path / "latest", keep=9)
  refused(lambda: checkpoints.restore_newest(**LIKE, log=pytest.fail), "checkpoint 4", "nothing was changed")
  checkpoints.close()
  assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_restoring_from_an_empty_directory_returns_none(tmp_path):
  checkpoints = Checkpoints(tmp_path / "latest", keep=1)
  assert checkpoints.restore_newest(params=params(), state=odd(), log=pytest.fail) is None
  checkpoints.close()


def test_parameters_are_loaded_from_the_newest_valid_checkpoint_with_a_warning(tmp_path, caplog):
  numbered(tmp_path, 1, 2)
  shutil.rmtree(tmp_path / "2" / "params")
  assert_same(load_params(tmp_path, shapes(params()))[0], params())
  assert "checkpoint 2" in caplog.text
  assert "an older one is used" in caplog.text


def without_packing(arrays):
  return {**arrays, "crc32": checkpoint._checksums(arrays)}


@pytest.mark.parametrize("pack", [dict, without_packing])
def test_a_checkpoint_without_packing_or_checksums_is_refused(tmp_path, monkeypatch, pack):
  monkeypatch.setattr(checkpoint, "_pack", pack)
  numbered(tmp_path, 1)
  refused(lambda: load_params(tmp_path, shapes(params())), "checkpoint 1", "is damaged", "checksums")


def test_reading_logs_nothing(saved, caplog):
  load_params(saved, shapes(params()))
  checkpoint.read(saved, 3)
  assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_missing_orbax_is_one_line(tmp_path, monkeypatch, caplog):
  numbered(tmp_path, 1, 2)
  monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
  refused(lambda: load_params(tmp_path, shapes(params())), "pip install orbax-checkpoint")
  refused(lambda: Checkpoints(tmp_path, keep=1), "pip install orbax-checkpoint")
  assert not caplog.text


def test_a_failed_save_keeps_earlier_checkpoints_and_the_next_save_succeeds(tmp_path, monkeypatch):
  numbered(tmp_path, 1)
  checkpoints = Checkpoints(tmp_path, keep=9)

  def full(*_, **__):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(SaveError, match=r"checkpoint 2 in .*No space left on device.*checkpoint 1 is kept"):
      checkpoints.save(2, params=params(), state=odd())
  assert checkpoints.latest() == 1
  (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # As a killed process leaves one.
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path, keep=9)
  checkpoints.save(3, params=params(), state=odd())
  checkpoints.wait()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]
  checkpoints.close()
