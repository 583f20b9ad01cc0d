import jax
import numpy as np
import pytest

from jedi_jax import replay
from jedi_jax.config import override
from jedi_jax.envs.catch import SPEC
from jedi_jax.errors import UserError
from jedi_jax.models.base import Phase
from jedi_jax.training.learner import Learner
from jedi_jax.training.updates import make_optimizers


@pytest.fixture(scope="module")
def recorded():
  rng = np.random.default_rng(0)
  frames = rng.integers(256, size=(21, *SPEC.observation_shape), dtype=np.uint8)
  return replay.from_episodes([replay.Episode(frames, rng.integers(3, size=20), rng.normal(size=20), ends=True)])


def test_it_trains_on_recorded_episodes_of_another_size_than_the_configurations_replay(tiny, recorded):
  learner = Learner(tiny.config, SPEC, tiny.devices())
  learner.start([learner.init(seed=0)], [recorded])
  lowered = learner.lower()
  # A replay has [S, slots, H W C] frames; the shapes are those of the data.
  shapes = {tuple(x.shape) for x in jax.tree.leaves(lowered.in_avals)}
  assert (1, *recorded.frames.shape) in shapes
  before = learner.snapshot()
  learner.epoch = tiny.epoch()  # Compiled for the configuration's replay.
  learner.start([before[0]], [tiny.devices().to_host(tiny.replay())])
  [sums] = learner.update({"denoiser": 2})
  assert learner.updates() == {"denoiser": 2, "reward_end": 0, "actor_critic": 0, "probe": 0}
  assert np.isfinite(sums["denoiser"]["loss"])
  assert learner.skipped() == dict.fromkeys(learner.phases, 0)
  # The epoch can be lowered again after it was compiled.
  assert isinstance(learner.lower(), jax.stages.Lowered)


def test_mistakes_of_a_caller_are_named(tiny):
  learner = tiny.learner()
  learner.add([None])
  with pytest.raises(UserError, match="unknown phase 'denoisr'; nearest: denoiser"):
    learner.update({"denoisr": 1})
  with pytest.raises(UserError, match="phase 'planner' has no optimizer"):
    make_optimizers(tiny.config, [Phase(name="planner", components=("encoder",), length=1, losses=lambda *_: None)])
  with pytest.raises(UserError, match=r"env\.action_slots=2 is too small"):
    Learner(override(tiny.config, {"env.action_slots": 2}), SPEC, tiny.devices())
