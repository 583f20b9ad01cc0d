"""Our `diamond` variant against numbers of the public PyTorch implementation.

tests/data/diamond_a18.npz and .json hold inputs and outputs of github.com/eloialonso/diamond (default configuration, 18
actions), computed in float32 on a CPU, and the formula of its weights.
"""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedi_jax.interop import diamond
from jedi_jax.models import codecs, variants
from jedi_jax.models import dynamics as dynamics_lib
from jedi_jax.nn.lstm import zero_lstm_state
from jedi_jax.ops import edm, returns, sampler
from jedi_jax.training import updates

DATA = pathlib.Path(__file__).parents[1] / "data"
REFERENCE = np.load(DATA / "diamond_a18.npz")
META = json.loads((DATA / "diamond_a18.json").read_text())
NETWORK, CLOSED = 1e-3, 1e-5  # Relative tolerances of outputs of whole networks, and of formulas.
LEVEL = 2 / 255


def weights(name: str, shape: list[int]) -> np.ndarray:
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
def state_dict():
  return {name: weights(name, shape) for name, shape in META["shapes"].items()}


@pytest.fixture(scope="module")
def loaded(state_dict):
  config, spec = diamond.infer(state_dict, env="atari/Breakout")
  params = jax.tree.map(jnp.asarray, diamond.import_params(state_dict, config, spec))
  return config, spec, params


@pytest.fixture(scope="module")
def parts(loaded):
  config, spec, _ = loaded
  context = variants._Context(config, spec, "matmul_gradient", jnp.float32, spec.num_actions)
  codec = codecs.identity(spec.observation_shape)
  return {
    "dynamics": variants._diffusion(context, codec),
    "reward_end": variants._reward_end(context, codec),
    "actor_critic": variants._actor_critic(context, codec),
  }


def nhwc(x: np.ndarray) -> jax.Array:
  return jnp.asarray(np.moveaxis(x, -3, -1))


def close(actual, name, tolerance):
  expected = REFERENCE[name]
  scale = np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance * scale, err_msg=name)


def close_quantised(actual, name):
  """At most 0.5 % of the numbers differ, and those by one of the 256 levels."""
  difference = np.abs(np.asarray(jnp.moveaxis(actual, -1, -3)) - REFERENCE[name])
  assert (difference > 1e-5).mean() <= 0.005
  assert difference.max() <= LEVEL * 1.001


def test_configuration_is_inferred(loaded):
  config, spec, params = loaded
  assert spec.num_actions == 18
  assert spec.observation_shape == (64, 64, 3)
  assert config.denoiser.channels == (64, 64, 64, 64)
  assert config.denoiser.conditioning_frames == 4
  assert config.actor_critic.downsample == (True, True, True, True)
  counts = variants.count_parameters(params)
  shapes = META["shapes"].items()
  for component, prefix in (("denoiser", "denoiser."), ("reward_end", "rew_end"), ("actor_critic", "actor_critic")):
    expected = sum(int(np.prod(s)) for n, s in shapes if n.startswith(prefix) and not n.endswith("noise_emb.weight"))
    assert counts[component] == expected
  ours = jax.eval_shape(variants.build(config, spec).init, jax.random.key(0))
  assert jax.tree.map(lambda x: x.shape, ours) == jax.tree.map(lambda x: x.shape, params)


def test_export_is_the_inverse(loaded, state_dict):
  config, spec, params = loaded
  exported = diamond.export_state_dict(params, config, spec)
  assert exported.keys() == state_dict.keys()
  for name, value in state_dict.items():
    np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_preconditioning():
  c = edm.precondition(jnp.asarray(REFERENCE["den_sigma"]), sigma_data=0.5, offset_noise=0.3)
  for name in ("c_in", "c_out", "c_skip", "c_noise"):
    close(getattr(c, name), f"den_{name}", CLOSED)


def test_inner_network_and_denoiser(loaded, parts):
  from jedi_jax.nn import blocks
  from jedi_jax.nn.denoiser import InnerNetwork

  config, spec, params = loaded
  c = config.denoiser
  past, noisy = nhwc(REFERENCE["den_obs"]), nhwc(REFERENCE["den_noisy"])
  actions, sigma = jnp.asarray(REFERENCE["den_act"], jnp.int32), jnp.asarray(REFERENCE["den_sigma"])
  coefficients = edm.precondition(sigma, sigma_data=0.5, offset_noise=0.3)
  network = InnerNetwork(spec.num_actions, c.channels, c.depths, c.attention, c.conditioning_width)
  c_in, c_out, c_skip = (x[:, None, None, None] for x in coefficients[:3])
  output = blocks.apply(network, params["denoiser"], c_in * noisy, coefficients.c_noise, past / 0.5, actions)
  close(jnp.moveaxis(output, -1, 1), "den_model_output", NETWORK)
  codec = codecs.identity(spec.observation_shape)
  close_quantised(codec.quantise(c_skip * noisy + c_out * output), "den_denoised")


def test_sampler(loaded, parts):
  config, _, params = loaded
  s = config.sampler
  sigmas = sampler.karras_sigmas(s.num_steps, sigma_min=s.sigma_min, sigma_max=s.sigma_max, rho=s.rho)
  close(sigmas, "smp_sigmas", CLOSED)
  noise = dynamics_lib.SampleNoise(nhwc(REFERENCE["smp_noise"]), None)
  past, actions = nhwc(REFERENCE["den_obs"]), jnp.asarray(REFERENCE["den_act"], jnp.int32)
  out = jax.jit(parts["dynamics"].sample)(params["denoiser"], past, actions, noise)
  close_quantised(out, "smp_out")


def denoising_inputs():
  observations = nhwc(REFERENCE["loss_obs"])
  draws = dynamics_lib.DenoisingNoise(
    sigma=jnp.asarray(REFERENCE["loss_sigma"].T),
    noise=jnp.moveaxis(nhwc(REFERENCE["loss_noise"]), 0, 1),
    offset=jnp.moveaxis(nhwc(REFERENCE["loss_offset_noise"]), 0, 1),
    use_estimate=jnp.asarray(True),
  )
  actions, mask = jnp.asarray(REFERENCE["loss_act"], jnp.int32), jnp.asarray(REFERENCE["loss_mask"])
  return observations[:, :-1], observations[:, 4:], actions[:, :-1], mask[:, 4:], draws


def test_denoising_loss_and_gradients(loaded, parts):
  config, spec, params = loaded

  @jax.jit
  @jax.value_and_grad
  def loss(denoiser):
    terms = parts["dynamics"].losses(denoiser, *denoising_inputs()).terms
    return sum(jnp.sum(t.values * t.weights) / jnp.sum(t.weights) for t in terms.values())

  value, gradient = loss(params["denoiser"])
  close(value, "loss_denoising", NETWORK)
  frequencies = gradient["noise_embedding"].pop("frequencies")
  assert not np.any(frequencies)
  close(optax.global_norm(gradient), "loss_denoising_grad_norm", 1e-2)
  gradient["noise_embedding"]["frequencies"] = frequencies
  zeros = jax.tree.map(jnp.zeros_like, params)
  exported = diamond.export_state_dict({**zeros, "denoiser": gradient}, config, spec)
  names = [name for name in REFERENCE.files if name.startswith("grad_")]
  assert len(names) == 4
  for name in names:
    expected, actual = REFERENCE[name], exported[name.removeprefix("grad_")]
    assert np.linalg.norm(actual - expected) <= 1e-2 * np.linalg.norm(expected), name


def test_reward_end_logits(loaded, parts):
  config, _, params = loaded
  frames, following = nhwc(REFERENCE["rew_obs"]), nhwc(REFERENCE["rew_next_obs"])
  actions = jnp.asarray(REFERENCE["rew_act"], jnp.int32)
  state = zero_lstm_state(2, config.reward_end.lstm_width)
  rewards, ends, state = parts["reward_end"].predict(params["reward_end"], frames, actions, following, state)
  close(rewards, "rew_logits_rew", NETWORK)
  close(ends, "rew_logits_end", NETWORK)
  close(state.hidden, "rew_h", NETWORK)
  close(state.cell, "rew_c", NETWORK)


def test_reward_end_loss(loaded, parts):
  _, _, params = loaded
  observations = np.moveaxis(REFERENCE["rewloss_obs"], 2, -1).copy()
  following = observations[:, 1:].copy()
  ends = REFERENCE["rewloss_end"]
  following[1, ends[1].argmax()] = np.moveaxis(REFERENCE["rewloss_final_obs"], 0, -1)
  losses = parts["reward_end"].losses(
    params["reward_end"],
    jnp.asarray(observations[:, :-1]),
    jnp.asarray(REFERENCE["rewloss_act"][:, :-1], jnp.int32),
    jnp.asarray(following),
    jnp.asarray(REFERENCE["rewloss_rew"][:, :-1]),
    jnp.asarray(ends[:, :-1]),
    jnp.asarray(REFERENCE["rewloss_mask"][:, :-1]),
  )
  for term, name in (("reward", "rewloss_rew_loss"), ("end", "rewloss_end_loss")):
    values, mask = losses.terms[term]
    close(jnp.sum(values * mask) / jnp.sum(mask), name, NETWORK)


def test_actor_critic(loaded, parts):
  config, _, params = loaded
  frames = nhwc(REFERENCE["ac_obs"])
  state = zero_lstm_state(2, config.actor_critic.lstm_width)
  logits, values, state = parts["actor_critic"].apply(params["actor_critic"], frames, state)
  close(logits, "ac_logits", NETWORK)
  close(values, "ac_values", NETWORK)
  close(state.hidden, "ac_h", NETWORK)
  close(state.cell, "ac_c", NETWORK)


def test_lambda_returns():
  # Ours has no truncations inside a sequence: the parts between them are sequences of their own.
  reward, end, truncated, value = (REFERENCE[f"lam_{x}"] for x in ("rew", "end", "trunc", "val_bootstrap"))
  actual = np.zeros_like(value)
  for b, cut in enumerate(truncated):
    for at in np.split(np.arange(len(cut)), np.flatnonzero(cut) + 1):
      if len(at):
        part = (jnp.asarray(x[b : b + 1, at]) for x in (np.sign(reward), end, value))
        actual[b, at] = returns.lambda_returns(*part, gamma=0.985, lambda_=0.95)[0]
  close(actual, "lam_returns", CLOSED)


def test_decay_groups(loaded):
  config, spec, params = loaded
  marks = updates.decayed(params)
  paths = {rule.name: rule.path for rule in diamond.rules(config, spec)}
  names = {"denoiser": "denoiser", "rew_end_model": "reward_end", "actor_critic": "actor_critic"}
  for component in names:
    groups = META["optimizer_groups"][component]
    for group, expected in (("decayed", True), ("not_decayed", False)):
      assert groups[group]
      for name in groups[group]:
        node = marks
        for key in paths[f"{component}.{name}"]:
          node = node[key]
        assert node is expected, name
