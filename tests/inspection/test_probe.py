import jax
import numpy as np
import pytest

from jedi_jax.agent import Agent, load_agent
from jedi_jax.config import override
from jedi_jax.errors import UserError
from jedi_jax.inspection import probe
from jedi_jax.models.build import build


@pytest.fixture(scope="module")
def blind(agent):
  """The same agent as if its run had had no probe."""
  config = override(agent.config, {"training.first_updates.probe": 0, "training.updates.probe": 0})
  params = {name: tree for name, tree in agent.params.items() if name != "probe"}
  return Agent(build(config, agent.model.spec), params, config)


def test_a_probe_is_fitted_afterwards(blind, episodes, tmp_path):
  assert blind.model.decode is None
  seeing = probe.fit(blind, episodes, updates=300)
  assert {name for name in seeing.params if name not in blind.params} == {"probe"}
  for name, tree in blind.params.items():
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(seeing.params[name]), strict=True):
      np.testing.assert_array_equal(a, b)
  frames = np.concatenate([episode.observations for episode in episodes])[None]
  latents = seeing.model.encode(seeing.params, frames, np.ones(frames.shape[:2], bool))
  shown = np.asarray(seeing.model.decode(seeing.params, latents), np.float64)
  error = np.mean((shown - frames) ** 2)
  # Better than one picture for all frames, of an encoder that has learned next to nothing.
  assert error < 0.9 * np.mean((frames.mean(axis=1, keepdims=True) - frames) ** 2)
  loaded = load_agent(seeing.save(tmp_path / "agent"))
  jax.tree.map(np.testing.assert_array_equal, loaded.params, seeing.params)
  assert loaded.model.decode is not None


def test_an_agent_that_shows_its_latents_stays_as_it_is(agent, episodes):
  assert probe.fit(agent, episodes, updates=5) is agent


def test_without_frames_there_is_nothing_to_fit(blind):
  with pytest.raises(UserError, match="no episode"):
    probe.fit(blind, [], updates=5)
