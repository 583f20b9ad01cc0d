"""Files from elsewhere: every reader takes mutations of valid files, or refuses them in one line.

FUZZ_SECONDS (30) and FUZZ_SEED (0) choose the long form of each reader.
"""

import io
import json
import os
import pathlib
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from readers import READERS, attempt, limited_memory

from jedi_jax import datasets

SECONDS, SEED = os.environ.get("FUZZ_SECONDS", "30"), os.environ.get("FUZZ_SEED", "0")
COUNTS = {"diamond": 10, "shapes": 10, "checkpoint": 5, "packed": 300, "replay": 100, "result": 25, "metrics": 25,
          "config": 50, "dataset": 50, "recorded": 10, "agent": 25}  # fmt: skip
"""Executions of the short form."""


@pytest.fixture
def reader(request, tmp_path):
  made = READERS[request.param](tmp_path)
  yield made
  made.close()


@pytest.mark.parametrize("reader", READERS, indirect=True)
def test_files_and_mutations_of_them_are_read_or_refused(reader):
  pick = random.Random(0)
  for data in reader.seeds:
    assert (trace := attempt(reader, data)) is None, trace
  for _ in range(COUNTS[next(name for name, kind in READERS.items() if kind is type(reader))]):
    data = reader.mutate(pick, pick.choice(reader.seeds))
    assert (trace := attempt(reader, data)) is None, (data[:300], trace)


def packed(*index):
  text = json.dumps(index).encode()
  return len(text).to_bytes(8, "little") + text + bytes(8)


def result(**changes):
  about = {"env": "minatar/Breakout", "variant": "jedi", "preset": "paper", "seed": 0, "env_steps": 1,
           "mean_return": 1.0, "episode_returns": [1.0], "max_episode_steps": 27_000, "seconds": 9.0}  # fmt: skip
  return json.dumps(about | changes).encode()


def episode(**members):
  file, whole = io.BytesIO(), io.BytesIO()
  np.save(whole, np.zeros((), bool))
  with zipfile.ZipFile(file, "w") as archive:
    for name in datasets.FIELDS:
      archive.writestr(f"{name}.npy", members.get(name, whole.getvalue()))
  return file.getvalue()


# Inputs that broke a reader, or made it take all memory, until it was mended.
BROKE = [
  ("packed", b""),
  ("packed", b"\x02" + bytes(7) + b"{]" + bytes(8)),
  ("packed", packed([2**63, "float32", [2]])),  # A name that is no string.
  ("packed", packed(["a\nb", "float32", [2]])),  # A message of two lines.
  ("packed", packed(["kernel", "9" * 5000, [2]])),
  ("packed", packed(["kernel", "float32", [2**31, "x"]])),  # 2 GiB of x.
  ("packed", packed(["kernel", "float32"])),
  ("packed", packed(["kernel", "object", [1]])),
  ("replay", b'[["x", "int32", [2], 0]]'),
  ("metrics", b'{"epoch": 1' + b"0" * 400 + b"}\n"),
  ("metrics", b"[" * 100_000 + b"\n"),
  ("result", result(episode_returns=[10**400])),
  ("result", result(env_steps=10**400)),
  ("dataset", b"E" + episode(terminated=b"no array")),
  ("dataset", b"E" + episode(rewards=b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4', ")),  # An end within the header.
]


@pytest.mark.parametrize(("reader", "data"), BROKE, indirect=["reader"])
def test_inputs_that_broke_a_reader_no_longer_do(reader, data):
  with limited_memory():
    assert attempt(reader, data) is None


@pytest.mark.parametrize("name", ["act_emb.0.weight", "conv_out.weight"])
def test_no_actions_and_no_channels_are_refused(tmp_path, name):
  reader = READERS["shapes"](tmp_path)
  arrays = json.loads(reader.seeds[0])
  next(shape for key, _, shape in arrays if key == f"denoiser.inner_model.{name}")[0] = 0
  assert attempt(reader, json.dumps(arrays).encode()) is None
  reader.close()


@pytest.mark.cluster
@pytest.mark.parametrize("name", READERS)
def test_many_mutations_are_read_or_refused(name, tmp_path):
  program = str(pathlib.Path(__file__).with_name("readers.py"))
  argv = [sys.executable, "-W", "ignore", program, name, SECONDS, SEED, str(tmp_path)]
  done = subprocess.run(argv, capture_output=True, text=True, timeout=float(SECONDS) + 120, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  print(about := done.stdout.splitlines()[-1])
  found = {path.stem: path.read_text()[-2000:] for path in tmp_path.glob("*.txt")}
  assert not found, f"{about}; the inputs are in {tmp_path}; {found}"
