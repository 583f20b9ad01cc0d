"""Our `diamond` variant against numbers of the public PyTorch implementation, away from its default configuration.

tests/data/diamond_small.npz and .json hold inputs and outputs of the modules of github.com/eloialonso/diamond, computed
in float32 on a CPU with PyTorch 2.13, and the shapes of their weights (the formula is that of the default case):
5 actions, frames of 16 x 16, U-Net channels (8, 16), depths (1, 2), attention on the second level, 3 past frames.
The samplers take 4 steps; they draw `smp_noises` in their order, the first being the start.
"""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax import config as config_lib
from jedi_jax.interop import diamond
from jedi_jax.models import dynamics as dynamics_lib
from jedi_jax.models.build import build
from jedi_jax.nn import blocks
from jedi_jax.nn.denoiser import InnerNetwork
from jedi_jax.nn.lstm import zero_lstm_state
from jedi_jax.ops import edm
from jedi_jax.types import Compute

DATA = pathlib.Path(__file__).parents[1] / "data"
REFERENCE = np.load(DATA / "diamond_small.npz")
META = json.loads((DATA / "diamond_small.json").read_text())
NETWORK = 1e-3
LEVEL = 2 / 255
APPLY = jax.jit(blocks.apply, static_argnums=0)  # The denoiser's network is compiled once for all samplers.


def weights(name, shape):
  rng = np.random.default_rng([META["weight_seed"], zlib.crc32(name.encode())])
  x = rng.standard_normal(shape).astype(np.float32)
  if name.endswith("noise_emb.weight"):
    return x
  if len(shape) >= 2:
    return x / np.sqrt(np.float32(np.prod(shape[1:])))
  if name.endswith("bias") or ".bias_" in name:
    return x * np.float32(0.1)
  return np.float32(1) + np.float32(0.1) * x


@pytest.fixture(scope="module")
def loaded():
  arrays = {name: weights(name, shape) for name, shape in META["shapes"].items()}
  config, spec = diamond.infer(arrays, env="atari/Breakout")
  return config, spec, jax.tree.map(jnp.asarray, diamond.import_params(arrays, config, spec))


def make_model(loaded, **changes):
  config, spec, _ = loaded
  precision = {"precision.compute_dtype": "float32", "precision.convolution": "lax"}
  return build(config_lib.override(config, precision | changes), spec)


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def actions(name):
  return jnp.asarray(REFERENCE[name], jnp.int32)


def close(actual, name):
  expected = REFERENCE[name]
  scale = np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(actual), expected, rtol=NETWORK, atol=NETWORK * scale, err_msg=name)


def close_quantised(actual, name):
  """At most 0.5 % of the numbers differ, and those by one of the 256 levels."""
  difference = np.abs(np.asarray(jnp.moveaxis(actual, -1, -3)) - REFERENCE[name])
  assert (difference > 1e-5).mean() <= 0.005
  assert difference.max() <= LEVEL * 1.001


def test_configuration_is_inferred(loaded):
  config, spec, params = loaded
  assert (spec.num_actions, spec.observation_shape) == (5, (16, 16, 3))
  d, r, a = config.denoiser, config.reward_end, config.actor_critic
  assert (d.channels, d.depths, d.attention) == ((8, 16), (1, 2), (False, True))
  assert (d.conditioning_width, d.conditioning_frames) == (36, 3)
  assert (r.channels, r.depths, r.attention) == ((8, 16, 16), (1, 2, 1), (False, True, False))
  assert (r.conditioning_width, r.lstm_width) == (20, 24)
  assert (a.channels, a.downsample, a.lstm_width) == ((8, 16), (True, False), 20)
  ours = jax.eval_shape(build(config, spec).init, jax.random.key(0))
  assert jax.tree.map(lambda x: x.shape, ours) == jax.tree.map(lambda x: x.shape, params)


def test_inner_network_and_denoiser(loaded, monkeypatch):
  config, spec, params = loaded
  c = config.denoiser
  past, noisy, sigma = nhwc(REFERENCE["den_obs"]), nhwc(REFERENCE["den_noisy"]), jnp.asarray(REFERENCE["den_sigma"])
  coefficients = edm.precondition(sigma, sigma_data=0.5, offset_noise=0.3)
  network = InnerNetwork(
    spec.num_actions,
    c.channels,
    c.depths,
    c.attention,
    c.conditioning_width,
    compute=Compute(),
  )
  output = APPLY(
    network,
    params["denoiser"],
    coefficients.c_in[:, None, None, None] * noisy,
    coefficients.c_noise,
    past / 0.5,
    actions("den_act"),
  )
  close(jnp.moveaxis(output, -1, 1), "den_model_output")
  monkeypatch.setattr(dynamics_lib.blocks, "apply", APPLY)
  denoised = make_model(loaded).dynamics.denoise(params["denoiser"], noisy, sigma, past, actions("den_act"))
  close_quantised(denoised, "den_denoised")


@pytest.mark.parametrize(
  ("name", "order", "churn"), [("smp_heun", 2, 0.0), ("smp_churn1", 1, 1.0), ("smp_churn2", 2, 1.0)]
)
def test_sampler(loaded, monkeypatch, name, order, churn):
  _, _, params = loaded
  settings = {"sampler.num_steps": 4, "sampler.order": order, "sampler.churn": churn}
  dynamics = make_model(loaded, **settings).dynamics
  noises = nhwc(REFERENCE["smp_noises"])
  noise = dynamics_lib.SampleNoise(noises[0], jnp.moveaxis(noises[1:], 0, 1) if churn else None)
  monkeypatch.setattr(dynamics_lib.blocks, "apply", APPLY)
  out = dynamics.sample(params["denoiser"], nhwc(REFERENCE["den_obs"]), actions("den_act"), noise)
  close_quantised(out, name)


def test_reward_end_logits(loaded):
  config, _, params = loaded
  model = make_model(loaded).reward_end
  frames, following = nhwc(REFERENCE["rew_obs"]), nhwc(REFERENCE["rew_next_obs"])
  state = zero_lstm_state(2, config.reward_end.lstm_width)
  rewards, ends, state = jax.jit(model.predict)(params["reward_end"], frames, actions("rew_act"), following, state)
  close(rewards, "rew_logits_rew")
  close(ends, "rew_logits_end")
  close(state.hidden, "rew_h")
  close(state.cell, "rew_c")


def test_actor_critic(loaded):
  config, _, params = loaded
  actor_critic = make_model(loaded).actor_critic
  state = zero_lstm_state(2, config.actor_critic.lstm_width)
  logits, values, state = jax.jit(actor_critic.apply)(params["actor_critic"], nhwc(REFERENCE["ac_obs"]), state)
  close(logits, "ac_logits")
  close(values, "ac_values")
  close(state.hidden, "ac_h")
  close(state.cell, "ac_c")
