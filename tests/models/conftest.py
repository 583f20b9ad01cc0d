from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unoptimised

from jedi_jax.models import actor_critic as actor_critic_lib
from jedi_jax.models import codecs
from jedi_jax.models import dynamics as dynamics_lib
from jedi_jax.models import reward_end as reward_end_lib
from jedi_jax.models.base import Model, Parts
from jedi_jax.models.compose import compose
from jedi_jax.nn.denoiser import InnerNetwork
from jedi_jax.types import Compute, EnvSpec, Segment

NETWORK = InnerNetwork(3, (8,), (0,), (False,), conditioning_width=8, compute=Compute(lowering="matmul_gradient"))
TARGETS = {"conditioning_frames": 2, "targets": 2}
SCHEDULE = dynamics_lib.Schedule((5.0, 0.5, 0.0))


class World(NamedTuple):
  """A tiny world model, its parts, and parameters of which none is zero."""

  codec: codecs.Codec
  dynamics: dynamics_lib.Dynamics
  reward_end: reward_end_lib.RewardEnd
  actor_critic: actor_critic_lib.ActorCritic
  model: Model
  params: dict


@pytest.fixture(scope="session")
def jit():
  return unoptimised.jit


@pytest.fixture(scope="session")
def random_params():
  """From an `init` to parameters of which none is zero; gains are near 1."""

  def draw(init):
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: jnp.asarray((path[-1].key == "scale") + 0.3 * rng.standard_normal(leaf.shape), jnp.float32),
      jax.eval_shape(init, jax.random.key(0)),
    )

  return draw


@pytest.fixture(scope="session")
def make_dynamics():
  """From a codec and what differs from `TARGETS` and `SCHEDULE` to diffusion."""
  return lambda codec, **changes: dynamics_lib.diffusion(codec, NETWORK, **{**TARGETS, "schedule": SCHEDULE, **changes})


@pytest.fixture(scope="session")
def world(random_params, make_dynamics):
  spec = EnvSpec(num_actions=3, observation_shape=(16, 16, 3))
  common = {"compute": Compute(lowering="matmul_gradient")}
  codec = codecs.learned(
    (16, 16, 3), channels=(4, 4), downsample=(True, True), patch=1, clamp=3.0, clamp_estimate=True, chunk=0, **common
  )
  dynamics = make_dynamics(codec)
  reward_end = reward_end_lib.reward_end_model(
    codec.latent_shape,
    num_actions=3,
    channels=(4,),
    depths=(1,),
    attention=(False,),
    downsample=False,
    conditioning_width=4,
    lstm_width=5,
    **common,
  )
  actor_critic = actor_critic_lib.actor_critic(
    codec.latent_shape,
    num_actions=3,
    channels=(),
    downsample=(),
    lstm_width=5,
    objective=actor_critic_lib.Objective(gamma=0.9, lambda_=0.8, entropy_weight=0.01, value_weight=0.5),
    **common,
  )
  model = compose(
    Parts(
      spec=spec,
      codec=codec,
      dynamics=dynamics,
      reward_end=reward_end,
      actor_critic=actor_critic,
      conditioning_frames=2,
      targets=2,
      horizon=3,
    )
  )
  return World(codec, dynamics, reward_end, actor_critic, model, random_params(model.init))


@pytest.fixture(scope="session")
def make_segment():
  """From shape and mask to a segment of random content, also where it is padding."""

  def make(batch, length, mask=None, seed=0):
    rng = np.random.default_rng(seed)
    return Segment(
      observations=jnp.asarray(rng.integers(0, 256, (batch, length, 16, 16, 3)), jnp.uint8),
      actions=jnp.asarray(rng.integers(0, 3, (batch, length)), jnp.int32),
      rewards=jnp.asarray(rng.integers(-3, 4, (batch, length)), jnp.float32),
      ends=jnp.asarray(rng.random((batch, length)) < 0.3),
      mask=jnp.ones((batch, length), bool) if mask is None else jnp.asarray(mask, bool),
    )

  return make
