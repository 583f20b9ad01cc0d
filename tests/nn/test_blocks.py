import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_layers import convolve, group_norm, normal, random_params, silu
from unoptimised import jit

from jedi_jax.nn import blocks, initializers
from jedi_jax.nn.lstm import Lstm, zero_lstm_state
from jedi_jax.nn.unet import UNet
from jedi_jax.types import Compute

# ---- Initialisation ----


class Everything(nn.Module):
  """A network with every initialiser."""

  @nn.compact
  def __call__(self, x, state):
    condition = blocks.FourierFeatures(6)(x[:, 0, 0, 0]) + nn.Embed(3, 6, embedding_init=initializers.normal)(
      jnp.arange(2)
    )
    x = UNet(channels=(8, 8), depths=(1, 0), attention=(True, False))(x, blocks.Condition(condition))
    return Lstm(5)(x.reshape(2, 1, -1), state)


EXAMPLES = (jax.ShapeDtypeStruct((2, 4, 4, 8), jnp.float32), jax.eval_shape(lambda: zero_lstm_state(2, 5)))


@pytest.fixture(scope="module")
def everything():
  return blocks.init_params(Everything(), jax.random.key(1), *EXAMPLES)


def test_initialisation_equals_that_of_flax(everything):
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), EXAMPLES)
  expected = jit(Everything().init)(jax.random.key(1), *zeros)["params"]
  jax.tree.map(np.testing.assert_array_equal, everything, expected)


def test_initialisation_is_a_pure_function_of_the_key(everything):
  def init(key):
    return blocks.init_params(Everything(), key, *EXAMPLES)

  shapes = jax.eval_shape(init, jax.random.key(1))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), everything)
  mapped = jit(jax.vmap(init))(jnp.stack([jax.random.key(1), jax.random.key(2)]))
  jax.tree.map(lambda x, alone: np.testing.assert_allclose(x[0], alone, atol=1e-6), mapped, everything)


@pytest.mark.parametrize("shape", [(3, 5), (128, 128), (3, 3, 64, 33)])
def test_numbers_are_those_of_flax_initialisers(shape):
  # Across the sizes that are drawn at once: 15, 16384 and 19008 numbers.
  key, fan_in = jax.random.key(3), np.prod(shape[:-1])
  scaled = nn.initializers.variance_scaling
  for actual, expected in (
    (initializers.fan_in_uniform, scaled(1 / 3, "fan_in", "uniform")),
    (
      initializers.scaled_uniform(1.0, (fan_in + shape[-1]) / 2),
      scaled(1.0, "fan_avg", "uniform", in_axis=range(len(shape) - 1)),
    ),
    (initializers.bias_uniform(7), lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -(7**-0.5), 7**-0.5)),
    (initializers.normal, nn.initializers.normal(1.0)),
  ):
    np.testing.assert_array_equal(actual(key, shape), expected(key, shape))


# ---- Convolution ----


@pytest.mark.parametrize("stride", [1, 2])
def test_the_convolution_module_adds_a_bias_and_starts_as_pytorch_does(stride):
  x = normal((2, 5, 4, 3))
  module = blocks.Conv3x3(64, stride=stride)
  params = module.init(jax.random.key(0), x)["params"]
  assert {name: value.shape for name, value in params.items()} == {"kernel": (3, 3, 3, 64), "bias": (64,)}
  bound = 27**-0.5  # 1 / sqrt(fan-in).
  for value in params.values():
    assert 0.8 * bound < np.max(np.abs(value)) <= bound
  expected = convolve(x, params["kernel"], stride) + np.asarray(params["bias"])
  np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


def test_downsampling_is_orthogonal_at_initialisation():
  x = normal((1, 5, 6, 4))
  module = blocks.Downsample()
  params = module.init(jax.random.key(0), x)["params"]
  rows = np.asarray(params["conv"]["kernel"]).reshape(-1, 4)  # One column an output channel.
  np.testing.assert_allclose(rows.T @ rows, np.eye(4), atol=1e-5)
  assert module.apply({"params": params}, x).shape == (1, 3, 3, 4)


# ---- Norms and attention ----


class Norm(nn.Module):
  """`blocks.group_norm` alone."""

  compute: Compute = Compute()
  silu: bool = False

  @nn.compact
  def __call__(self, x):
    return blocks.group_norm(x, compute=self.compute, name="norm", silu=self.silu)


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (32, 1), (48, 1), (64, 2), (96, 3)])
def test_group_norm_takes_statistics_over_groups_of_32_channels(channels, groups):
  # Every channel has a mean and a scale of its own, so that wrong groups show.
  x = normal((2, 3, 4, channels)) * jnp.linspace(0.5, 3, channels) + jnp.linspace(-2, 5, channels)
  params = {"scale": normal((channels,), seed=1), "bias": normal((channels,), seed=2)}
  expected = group_norm(x, groups) * np.asarray(params["scale"]) + np.asarray(params["bias"])
  given = {"params": {"norm": params}}
  for kernels in ("xla", "interpret"):
    np.testing.assert_allclose(Norm(Compute(kernels=kernels)).apply(given, x), expected, rtol=1e-3, atol=1e-4)
    activated = Norm(Compute(kernels=kernels), silu=True).apply(given, x)
    np.testing.assert_allclose(activated, silu(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (48, 1), (64, 2), (80, 2), (96, 3)])
def test_one_pass_group_norm_agrees_with_that_of_float32(channels, groups):
  x = (normal((2, 3, 4, channels)) * jnp.linspace(0.5, 3, channels) + jnp.linspace(-2, 5, channels)).astype(
    jnp.bfloat16
  )
  module = Norm(Compute(jnp.bfloat16))
  params = {"scale": normal((channels,), seed=1), "bias": normal((channels,), seed=2)}
  given = {"params": {"norm": params}}
  expected = group_norm(x.astype(jnp.float32), groups) * np.asarray(params["scale"]) + np.asarray(params["bias"])
  np.testing.assert_allclose(module.apply(given, x).astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)
  plain = Norm()
  assert jax.tree.map(jnp.shape, module.init(jax.random.key(0), x)) == jax.tree.map(
    jnp.shape, plain.init(jax.random.key(0), x.astype(jnp.float32))
  )


def test_group_norm_has_float32_statistics_under_bfloat16():
  # Near 64 bfloat16 resolves 0.5 only; the mean of the squares, 4097, it would round to 4096.
  x = (64 + 2 * normal((2, 8, 8, 8))).astype(jnp.bfloat16)
  module = Norm(Compute(jnp.bfloat16))
  params = module.init(jax.random.key(0), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  y = module.apply(params, x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), group_norm(x.astype(jnp.float32), 1), rtol=2e-2, atol=2e-2)


def test_adaptive_group_norm_is_scaled_and_shifted_by_the_condition():
  x, condition = 3 + normal((2, 3, 4, 64)), blocks.Condition(normal((2, 5)))
  module = blocks.AdaptiveGroupNorm()
  params = random_params(module, x, condition)
  assert set(params) == {"linear"}
  scale, shift = np.split(
    np.asarray(condition.value @ params["linear"]["kernel"] + params["linear"]["bias"]), 2, axis=-1
  )
  expected = silu(group_norm(x, 2) * (1 + scale[:, None, None]) + shift[:, None, None])
  np.testing.assert_allclose(module.apply({"params": params}, x, condition), expected, rtol=1e-3, atol=1e-4)


def test_attention_is_its_norm_at_initialisation_and_adds_softmax_attention_after():
  x, width = normal((2, 3, 2, 16)), 8
  module = blocks.SelfAttention()
  params = module.init(jax.random.key(0), x)["params"]
  np.testing.assert_allclose(module.apply({"params": params}, x), group_norm(x, 1), rtol=1e-4, atol=1e-5)

  params = random_params(module, x)
  tokens = np.asarray(group_norm(x, 1) * params["norm"]["scale"] + params["norm"]["bias"]).reshape(2, 6, 16)
  qkv = tokens @ np.asarray(params["qkv"]["kernel"]) + np.asarray(params["qkv"]["bias"])
  heads = []
  for head in range(2):  # 16 channels are two heads of 8.
    at = slice(head * width, (head + 1) * width)
    query, key, value = (qkv[..., 16 * i : 16 * (i + 1)][..., at] for i in range(3))
    scores = np.exp(query @ key.swapaxes(1, 2) / np.sqrt(width))
    heads.append(scores / scores.sum(-1, keepdims=True) @ value)
  mixed = np.concatenate(heads, -1) @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
  expected = (tokens + mixed).reshape(x.shape)  # As in DIAMOND the residual path starts behind the norm.
  np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def test_fourier_features_are_fixed():
  x = jnp.asarray([0.0, 0.25])
  module = blocks.FourierFeatures(4)
  params = {"frequencies": jnp.asarray([[1.0, 3.0]])}
  # 2 pi x f is 0 at first; then pi / 2 and 3 pi / 2.
  expected = [[1, 1, 0, 0], [0, 0, 1, -1]]
  np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)
  gradient = jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x) * normal((2, 4))))(params)
  np.testing.assert_array_equal(gradient["frequencies"], 0)


def test_the_small_residual_block_by_hand():
  x = normal((2, 3, 4, 4))
  for features in (4, 6):
    module = blocks.SmallResidualBlock(features)
    params = random_params(module, x)
    # A linear skip only where the channels change.
    assert set(params) == {"norm", "conv"} | ({"skip"} if features != 4 else set())
    h = silu(group_norm(x, 1) * np.asarray(params["norm"]["scale"]) + np.asarray(params["norm"]["bias"]))
    expected = convolve(h, params["conv"]["kernel"], 1) + np.asarray(params["conv"]["bias"])
    skip = np.asarray(x) if features == 4 else np.asarray(x @ params["skip"]["kernel"] + params["skip"]["bias"])
    np.testing.assert_allclose(module.apply({"params": params}, x), skip + expected, rtol=1e-3, atol=1e-4)


# ---- U-Net ----


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_the_unet_keeps_the_shape(levels, size):
  network = UNet(
    channels=(8, 16, 8, 24)[:levels], depths=(1, 2, 1, 0)[:levels], attention=(False, True, False, False)[:levels]
  )
  output, variables = jax.eval_shape(
    lambda x, condition: network.init_with_output(jax.random.key(0), x, condition),
    jnp.zeros((2, *size, 8)),
    blocks.Condition(jnp.zeros((2, 6))),
  )
  assert output.shape == (2, *size, 8)
  params = variables["params"]
  for level, depth in enumerate((1, 2, 1, 0)[:levels]):
    assert sum(name.startswith(f"down_{level}_") for name in params) == depth
    assert sum(name.startswith(f"up_{level}_") for name in params) == depth + 1
    assert (f"downsample_{level}" in params) == (f"upsample_{level}" in params) == (level > 0)
  assert {name for name in params if "attention" in params[name]} == {"middle_0", "middle_1"} | {
    name for name in params if name.startswith(("down_1_", "up_1_"))
  }


def test_the_unet_pads_at_the_bottom_and_right_and_crops():
  network = UNet(channels=(4, 4), depths=(0, 0), attention=(False, False))
  x, condition = normal((1, 3, 5, 4)), blocks.Condition(normal((1, 3)))
  params = random_params(network, x, condition)
  apply = jit(lambda x: network.apply({"params": params}, x, condition))
  expected = apply(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))[:, :3, :5]
  np.testing.assert_allclose(apply(x), expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_of_the_unet_gets_a_gradient():
  network = UNet(channels=(8, 16), depths=(1, 0), attention=(True, False))
  x, condition = normal((2, 4, 4, 8)), blocks.Condition(normal((2, 3)))
  params = random_params(network, x, condition)
  gradient = jit(jax.grad(lambda params: jnp.sum(jnp.square(network.apply({"params": params}, x, condition)))))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.max(np.abs(leaf)) > 0, jax.tree_util.keystr(path)
