"""Saves and logs on a full disk: a small tmpfs, which needs the permission to mount."""

import json
import os
import subprocess

import numpy as np
import pytest
from running import arrays, assert_equal_bit_for_bit, command, newest, process, to_the_end, until

from jedi_jax.runs.checkpoint import Checkpoints, SaveError
from jedi_jax.runs.program import USAGE_STATUS

pytestmark = pytest.mark.faults
ROOM = 6 * 2**20


@pytest.fixture
def disk(tmp_path):
  """Mounts a file system of 6 MiB."""
  path = tmp_path / "disk"
  path.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", path], capture_output=True, check=False
  )
  if mounted.returncode:
    pytest.skip(f"no permission to mount: {mounted.stderr.decode().strip()}")
  yield path
  subprocess.run(["umount", "--lazy", path], check=True)


def fill(disk, left):
  """Writes a file that leaves only `left` bytes free, and returns it."""
  space = os.statvfs(disk)
  file = disk / "others"
  with file.open("wb") as opened:
    opened.write(b"x" * max(space.f_bavail * space.f_frsize - left, 0))
  return file


def save_and_wait(checkpoints, number, noise):
  checkpoints.save(number, params={"x": noise}, state={"y": noise})
  checkpoints.wait()


def test_a_save_to_a_full_disk_keeps_the_earlier_one_and_a_later_one_succeeds(disk):
  noise = np.random.default_rng(0).integers(256, size=2**20, dtype=np.uint8)
  checkpoints = Checkpoints(disk / "latest", keep=2)
  save_and_wait(checkpoints, 1, noise)
  for left in (0, 10_000, 500_000, 1_500_000):
    file = fill(disk, left)
    with pytest.raises(SaveError, match=r"No space left on device.*checkpoint 1 is kept"):
      save_and_wait(checkpoints, 2, noise)
    file.unlink()
    got, _ = checkpoints.restore(1, params={"x": noise}, state={"y": noise})
    np.testing.assert_array_equal(got["x"], noise)
  save_and_wait(checkpoints, 2, noise)
  assert checkpoints.latest() == 2
  checkpoints.close()


@pytest.mark.parametrize("left", [60_000, 0])
def test_a_full_disk_is_reported_and_loses_nothing(disk, tiny, finished_run, timeless, left):
  """With little space, saves fail and logs continue; without any, the run stops."""
  directory = disk / "run"
  argv = command(tiny.flags(), directory)
  with process(argv) as running:
    _, met = until(running, "<epoch>", 4)  # Checkpoint 2 of five epochs is written or being written.
    assert met
    file = fill(disk, left)
    lines, _ = until(running, None)
    status = running.wait()
  reported = [
    line for line in lines if "No space left on device" in line and not line.startswith((" ", "ERROR", "ValueError"))
  ]
  assert status == USAGE_STATUS, lines
  assert any(line.startswith(("WARNING: checkpoint", "train.py: ")) for line in reported), lines
  assert not (directory / "result.json").exists()
  file.unlink()
  status, lines = to_the_end(argv)
  assert status == 0, lines
  assert json.loads((directory / "result.json").read_text())["updates"]
  assert timeless(directory / "metrics.jsonl") == timeless(finished_run / "metrics.jsonl")
  assert_equal_bit_for_bit(arrays(newest(directory)), arrays(newest(finished_run)))
