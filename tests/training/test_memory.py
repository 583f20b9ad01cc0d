import types

import jax
import numpy as np
import pytest

from jedi_jax.config import make_config
from jedi_jax.envs.catch import SPEC
from jedi_jax.errors import UserError
from jedi_jax.training import memory
from jedi_jax.training.learner import Learner, empty_replay


def test_what_a_run_takes(tiny):
  found = memory.measure(tiny.config, SPEC)

  def size(tree):
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))

  assert found.replay == size(tiny.devices().to_host(tiny.replay()))
  assert found.state == size(tiny.devices().to_host(tiny.state()))
  assert 0 < found.working < 2**30
  assert found.run == found.replay + found.state + found.working
  assert found.device > 2**28


def test_what_each_of_two_packed_runs_takes(tiny, monkeypatch):
  compiled = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(temp_size_in_bytes=1001))
  lowered = types.SimpleNamespace(compile=lambda: compiled)
  monkeypatch.setattr(Learner, "lower", lambda self: {2: lowered}[self.devices.runs])
  assert memory.measure(tiny.config, SPEC, runs=2).working == 500


def test_as_many_fit_as_nine_tenths_of_the_device_hold():
  one = memory.Memory(replay=60, state=30, working=10, device=1000)
  assert one.fit == 9
  assert one._replace(device=1111).fit == 9
  assert one._replace(device=1112).fit == 10
  assert one._replace(device=50).fit == 1  # One is always tried.


def test_a_replay_beyond_the_device_is_refused(tiny):
  memory.check_replay(tiny.config, SPEC)
  huge = make_config(env="catch", preset="debug", overrides={"replay.capacity": 10**8, "replay.final_frames": 10**8})
  with pytest.raises(UserError, match=r"replay\.capacity=100000000 .* take 3.. GiB, and the device has"):
    memory.check_replay(huge, SPEC)


def test_all_runs_of_a_device_count(tiny, monkeypatch):
  stats = {"bytes_limit": int(1.5 * memory.size(jax.eval_shape(lambda: empty_replay(tiny.config, SPEC))))}
  monkeypatch.setattr(memory.jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: stats)])
  memory.check_replay(tiny.config, SPEC)
  with pytest.raises(UserError, match="or take fewer runs"):
    memory.check_replay(tiny.config, SPEC, runs=2)
