import pytest

from jedi_jax.agent import load_agent
from jedi_jax.inspection import recording


@pytest.fixture(scope="session")
def agent(finished_run):
  return load_agent(finished_run)


@pytest.fixture(scope="session")
def episodes(agent):
  return recording.record(agent, steps=24, num_envs=2, seed=5)
