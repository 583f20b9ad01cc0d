import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jedi_jax.agent import Agent
from jedi_jax.envs.catch import SPEC
from jedi_jax.models.build import build
from jedi_jax.models.compose import compose
from jedi_jax.play.session import Session


@pytest.fixture(scope="session")
def agent(tiny):
  """An agent that has learned nothing; its dreams end with the action 'right' and not otherwise."""
  model = build(tiny.config, SPEC)
  predict = model.reward_end.predict

  def ends_on_the_right(params, frames, actions, following, state):
    rewards, ends, state = predict(params, frames, actions, following, state)
    sign = jnp.where(actions == 2, 50.0, -50.0)[..., None]
    return rewards, jnp.concatenate([-sign, sign], axis=-1) + 0 * ends, state

  reward_end = model.reward_end._replace(predict=ends_on_the_right)
  model = compose(dataclasses.replace(model.parts, reward_end=reward_end))
  return Agent(model, jax.jit(model.init)(jax.random.key(0)), tiny.config)


@pytest.fixture
def session(agent):
  session = Session(agent, seed=3, speed=60.0)
  yield session
  session.close()
