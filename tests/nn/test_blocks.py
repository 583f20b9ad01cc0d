import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jedi_jax.nn import blocks
from jedi_jax.types import LstmState

LOWERINGS = ("lax", "matmul_gradient", "matmul")

# Compiling is nearly all that these tests take, and the tiny networks gain nothing from LLVM's optimisations.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def random_params(module, *arguments):
  """Parameters of which none is zero; gains are near 1."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (path[-1].key == "scale") + 0.2 * normal(leaf.shape, seed=sum(map(ord, str(path)))), shapes
  )


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def group_norm(x, groups):
  """Group norm without gain and shift over groups of neighbouring channels, in float64."""
  x = np.asarray(x, np.float64)
  parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
  mean = parts.mean(axis=(1, 3), keepdims=True)
  variance = parts.var(axis=(1, 3), keepdims=True)
  return ((parts - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)


def convolve(x, kernel, stride):
  """3 x 3 convolution with one pixel of zero padding, position by position."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  rows, columns = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
  patches = np.stack([np.stack([padded[:, i : i + 3, j : j + 3] for j in columns], 1) for i in rows], 1)
  return np.einsum("bhwijc,ijco->bhwo", patches, kernel)


# ---- Convolution ----


@functools.partial(jax.jit, static_argnames=("stride", "lowering"))
def value_and_gradients(x, kernel, weights, *, stride, lowering):
  def loss(x, kernel):
    y = blocks.conv3x3(x, kernel, stride=stride, lowering=lowering)
    return jnp.sum(weights * jnp.sin(y)), y

  (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)
  return y, *gradients


def operands(size, stride, kernels=()):
  height, width = size
  out = (-(-height // stride), -(-width // stride))
  return normal((2, height, width, 3)), 0.3 * normal((*kernels, 3, 3, 3, 4)), normal((2, *out, 4), seed=1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (4, 5), (1, 2)])
def test_lowerings_agree_in_value_and_gradients(size, stride):
  x, kernel, weights = operands(size, stride)
  expected = value_and_gradients(x, kernel, weights, stride=stride, lowering="lax")
  np.testing.assert_allclose(expected[0], convolve(x, kernel, stride), rtol=1e-4, atol=1e-5)
  for lowering in LOWERINGS[1:]:
    actual = value_and_gradients(x, kernel, weights, stride=stride, lowering=lowering)
    for a, e in zip(actual, expected, strict=True):
      np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_kernel_gradient_does_not_depend_on_how_many_images_are_taken_at_a_time(stride, monkeypatch):
  x, kernel, weights = operands((5, 4), stride)
  x, weights = (jnp.concatenate([value, 2 * value, -value]) for value in (x, weights))  # Six images.
  expected = value_and_gradients(x, kernel, weights, stride=stride, lowering="lax")
  for positions in (1, 3 * weights[0, ..., 0].size, 5 * weights[0, ..., 0].size):  # One, three and three of them.
    monkeypatch.setattr(blocks, "_CACHED_POSITIONS", positions)
    actual = value_and_gradients(x, kernel, weights, stride=stride, lowering="matmul_gradient")
    for a, e in zip(actual, expected, strict=True):
      np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("stride", [1, 2])
def test_lowerings_can_be_mapped_over_kernels(stride, lowering):
  x, kernels, weights = operands((5, 4), stride, kernels=(2,))
  apply = functools.partial(value_and_gradients, stride=stride, lowering=lowering)
  mapped = jax.vmap(apply, in_axes=(None, 0, None))(x, kernels, weights)
  for i in range(2):
    expected = value_and_gradients(x, kernels[i], weights, stride=stride, lowering="lax")
    for a, e in zip(mapped, expected, strict=True):
      np.testing.assert_allclose(a[i], e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("stride", [1, 2])
def test_lowerings_work_in_a_scan(stride, lowering):
  x, kernel, weights = operands((4, 5), stride)

  def descend(kernel, x):
    _, _, gradient = value_and_gradients(x, kernel, weights, stride=stride, lowering=lowering)
    return kernel - 0.01 * gradient, gradient

  inputs = jnp.stack([x, 2 * x])
  final, gradients = jax.jit(lambda kernel, inputs: lax.scan(descend, kernel, inputs))(kernel, inputs)
  expected = kernel
  for i in range(2):
    _, _, gradient = value_and_gradients(inputs[i], expected, weights, stride=stride, lowering="lax")
    np.testing.assert_allclose(gradients[i], gradient, rtol=1e-3, atol=1e-4)
    expected = expected - 0.01 * gradient
  np.testing.assert_allclose(final, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_lowering_is_refused():
  with pytest.raises(ValueError, match="fft"):
    blocks.conv3x3(jnp.zeros((1, 2, 2, 1)), jnp.zeros((3, 3, 1, 1)), lowering="fft")


def test_the_automatic_lowering_depends_on_the_backend(monkeypatch):
  for backend, lowering in (("cpu", "matmul_gradient"), ("gpu", "lax"), ("tpu", "lax")):
    monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
    assert blocks.resolve_convolution("auto") == lowering
    assert blocks.resolve_convolution("matmul") == "matmul"


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


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (32, 1), (48, 1), (64, 2), (96, 3)])
def test_group_norm_takes_statistics_over_groups_of_32_channels(channels, groups):
  # Every channel has a mean and a scale of its own, so that wrong groups show.
  x = normal((2, 3, 4, channels)) * jnp.linspace(0.5, 3, channels) + jnp.linspace(-2, 5, channels)
  module = blocks.group_norm(channels, dtype=jnp.float32, name="norm")
  params = {"scale": normal((channels,), seed=1), "bias": normal((channels,), seed=2)}
  expected = group_norm(x, groups) * np.asarray(params["scale"]) + np.asarray(params["bias"])
  np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-3, atol=1e-4)


def test_group_norm_has_float32_statistics_under_bfloat16():
  # Near 64 bfloat16 resolves 0.5 only; the mean of the squares, 4097, it would round to 4096.
  x = (64 + 2 * normal((2, 8, 8, 8))).astype(jnp.bfloat16)
  module = blocks.group_norm(8, dtype=jnp.bfloat16, name="norm")
  params = module.init(jax.random.key(0), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  y = module.apply(params, x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), group_norm(x.astype(jnp.float32), 1), rtol=2e-2, atol=2e-2)


def test_adaptive_group_norm_is_scaled_and_shifted_by_the_condition():
  x, condition = 3 + normal((2, 3, 4, 64)), normal((2, 5))
  module = blocks.AdaptiveGroupNorm()
  params = module.init(jax.random.key(0), x, condition)["params"]
  assert set(params) == {"linear"}
  scale, shift = np.split(np.asarray(condition @ params["linear"]["kernel"] + params["linear"]["bias"]), 2, axis=-1)
  expected = group_norm(x, 2) * (1 + scale[:, None, None]) + shift[:, None, None]
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


# ---- Resolution ----


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3)])
def test_max_pooling_drops_an_odd_last_row_or_column(size):
  x = normal((2, *size, 3))
  rows, columns = size[0] // 2, size[1] // 2
  cropped = np.asarray(x)[:, : 2 * rows, : 2 * columns]
  expected = cropped.reshape(2, rows, 2, columns, 2, 3).max(axis=(2, 4))
  np.testing.assert_array_equal(blocks.max_pool_2x2(x), expected)


def test_the_gradient_of_max_pooling_goes_to_the_maximum():
  x = jnp.asarray([[1.0, 5.0, 0.0], [2.0, 3.0, 9.0]]).reshape(1, 2, 3, 1)
  gradient = jax.grad(lambda x: jnp.sum(blocks.max_pool_2x2(x)))(x)
  np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1, 0], [0, 0, 0]])


def test_upsampling_repeats_every_position():
  x = normal((2, 2, 3, 2))
  np.testing.assert_array_equal(blocks.upsample_nearest(x), np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))


@pytest.mark.parametrize("downsample", [(True, True), (False, True), (False, False)])
def test_the_convolution_stack_halves_where_it_pools(downsample):
  shape = jax.eval_shape(
    lambda x: blocks.ConvStack((4, 6), downsample).init_with_output(jax.random.key(0), x)[0], jnp.zeros((2, 8, 12, 3))
  ).shape
  factor = 2 ** sum(downsample)
  assert shape == (2, 8 // factor, 12 // factor, 6)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_patches_are_stacked_row_by_row_and_spread_again(side):
  x = np.arange(2 * 6 * 12 * 3).reshape(2, 6, 12, 3)
  stacked = np.asarray(blocks.stack_patches(jnp.asarray(x), side))
  assert stacked.shape == (2, 6 // side, 12 // side, side * side * 3)
  for i in range(side):
    for j in range(side):
      channels = slice(3 * (i * side + j), 3 * (i * side + j + 1))
      np.testing.assert_array_equal(stacked[..., channels], x[:, i::side, j::side])
  np.testing.assert_array_equal(blocks.spread_patches(jnp.asarray(stacked), side), x)


def test_the_convolution_stack_reads_patches():
  x = normal((2, 8, 12, 3))
  patched = blocks.ConvStack((4, 6), (True, False), 2)
  params = random_params(patched, x)
  plain = blocks.ConvStack((4, 6), (True, False))
  output = patched.apply({"params": params}, x)
  assert output.shape == (2, 2, 3, 6)
  np.testing.assert_allclose(output, plain.apply({"params": params}, blocks.stack_patches(x, 2)), rtol=1e-5, atol=1e-6)


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
  network = blocks.UNet((8, 16, 8, 24)[:levels], (1, 2, 1, 0)[:levels], (False, True, False, False)[:levels])
  output, variables = jax.eval_shape(
    lambda x, condition: network.init_with_output(jax.random.key(0), x, condition),
    jnp.zeros((2, *size, 8)),
    jnp.zeros((2, 6)),
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
  network = blocks.UNet((4, 4), (0, 0), (False, False))
  x, condition = normal((1, 3, 5, 4)), normal((1, 3))
  params = random_params(network, x, condition)
  apply = jit(lambda x: network.apply({"params": params}, x, condition))
  expected = apply(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))[:, :3, :5]
  np.testing.assert_allclose(apply(x), expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_of_the_unet_gets_a_gradient():
  network = blocks.UNet((8, 16), (1, 0), (True, False))
  x, condition = normal((2, 4, 4, 8)), normal((2, 3))
  params = random_params(network, x, condition)
  gradient = jit(jax.grad(lambda params: jnp.sum(jnp.square(network.apply({"params": params}, x, condition)))))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.max(np.abs(leaf)) > 0, jax.tree_util.keystr(path)


# ---- LSTM ----


def lstm(inputs, state, keep, params):
  """PyTorch's LSTM: gates input, forget, cell, output; the state is multiplied by `keep` after each step."""
  (kernel_ih, kernel_hh, bias_ih, bias_hh), outputs = (
    (np.asarray(params[name], np.float64) for name in ("kernel_ih", "kernel_hh", "bias_ih", "bias_hh")),
    [],
  )
  hidden, cell = (np.asarray(x, np.float64) for x in state)
  for t in range(inputs.shape[1]):
    gates = np.asarray(inputs[:, t]) @ kernel_ih + bias_ih + hidden @ kernel_hh + bias_hh
    i, f, g, o = np.split(gates, 4, axis=-1)
    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
    hidden = sigmoid(o) * np.tanh(cell)
    outputs.append(hidden)
    hidden, cell = hidden * keep[:, t, None], cell * keep[:, t, None]
  return np.stack(outputs, axis=1), hidden, cell


@pytest.fixture(scope="module")
def lstm_case():
  inputs = normal((2, 4, 3))
  state = LstmState(normal((2, 5), seed=1), normal((2, 5), seed=2))
  module = blocks.Lstm(5)
  params = random_params(module, inputs, state)
  return module, params, inputs, state


def test_the_lstm_equals_a_plain_loop(lstm_case):
  module, params, inputs, state = lstm_case
  outputs, after = module.apply({"params": params}, inputs, state)
  expected = lstm(inputs, state, np.ones((2, 4)), params)
  for actual, value in zip((outputs, *after), expected, strict=True):
    np.testing.assert_allclose(actual, value, rtol=1e-4, atol=1e-5)


def test_the_lstm_forgets_where_keep_is_zero(lstm_case):
  module, params, inputs, state = lstm_case
  keep = jnp.asarray([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
  outputs, after = module.apply({"params": params}, inputs, state, keep)
  expected = lstm(inputs, state, np.asarray(keep), params)
  for actual, value in zip((outputs, *after), expected, strict=True):
    np.testing.assert_allclose(actual, value, rtol=1e-4, atol=1e-5)
  # The first sequence starts afresh after step 1, the second ends empty.
  fresh, _ = module.apply({"params": params}, inputs[:, 2:], blocks.zero_lstm_state(2, 5))
  np.testing.assert_allclose(outputs[0, 2:], fresh[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(after.hidden[1], 0)
  np.testing.assert_array_equal(after.cell[1], 0)


def test_the_lstm_falls_back_on_a_given_state(lstm_case):
  module, params, inputs, state = lstm_case
  keep = jnp.asarray([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
  fallback = LstmState(normal((2, 5), seed=3), normal((2, 5), seed=4))
  outputs, after = module.apply({"params": params}, inputs, state, keep, fallback)
  plain, _ = module.apply({"params": params}, inputs, state)
  np.testing.assert_allclose(outputs[0, :2], plain[0, :2], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(outputs[1], plain[1], rtol=1e-5, atol=1e-6)
  fresh, fresh_after = module.apply({"params": params}, inputs[:, 2:], fallback)
  np.testing.assert_allclose(outputs[0, 2:], fresh[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(after.cell[0], fresh_after.cell[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_keep", [False, True])
def test_single_steps_and_the_scan_give_the_same(lstm_case, with_keep):
  module, params, inputs, state = lstm_case
  keep = jnp.asarray([[1.0, 0.0, 1.0, 0.5], [0.0, 1.0, 1.0, 1.0]]) if with_keep else None
  outputs, after = module.apply({"params": params}, inputs, state, keep)
  for t in range(4):
    step_keep = None if keep is None else keep[:, t : t + 1]
    output, state = module.apply({"params": params}, inputs[:, t : t + 1], state, step_keep)
    np.testing.assert_allclose(output[:, 0], outputs[:, t], rtol=1e-5, atol=1e-6)
  for actual, expected in zip(state, after, strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_lstm_starts_with_open_forget_gates_and_an_orthogonal_recurrence():
  module = blocks.Lstm(4)
  params = module.init(jax.random.key(0), jnp.zeros((1, 1, 3)), blocks.zero_lstm_state(1, 4))["params"]
  np.testing.assert_array_equal(params["bias_ih"], np.repeat([0, 1, 0, 0], 4))
  np.testing.assert_array_equal(params["bias_hh"], 0)
  np.testing.assert_allclose(params["kernel_hh"] @ params["kernel_hh"].T, np.eye(4), atol=1e-5)


def test_the_lstm_keeps_a_float32_state_under_bfloat16(lstm_case):
  _, params, inputs, state = lstm_case
  outputs, after = blocks.Lstm(5, dtype=jnp.bfloat16).apply({"params": params}, inputs, state)
  assert {x.dtype for x in (outputs, *after)} == {jnp.dtype(jnp.float32)}
  expected, _, _ = lstm(inputs, state, np.ones((2, 4)), params)
  np.testing.assert_allclose(outputs, expected, atol=3e-2)
