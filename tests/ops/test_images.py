import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from plain_layers import convolve, normal

from jedi_jax.ops import images

LOWERINGS = ("lax", "matmul_gradient", "matmul", "lax_per_run", "matmul_gradient_per_run")


@pytest.fixture(autouse=True)
def few_positions_are_many(monkeypatch):
  monkeypatch.setattr(images, "_MANY_POSITIONS", 40)


@functools.partial(jax.jit, static_argnames=("stride", "lowering"))
def value_and_gradients(x, kernel, weights, *, stride, lowering):
  def loss(x, kernel):
    y = images.conv3x3(x, kernel, stride=stride, lowering=lowering)
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
    monkeypatch.setattr(images, "_CACHED_POSITIONS", positions)
    actual = value_and_gradients(x, kernel, weights, stride=stride, lowering="matmul_gradient")
    for a, e in zip(actual, expected, strict=True):
      np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_kernel_gradient_in_bfloat16_is_summed_in_float32(stride, monkeypatch):
  monkeypatch.setattr(images, "_CACHED_POSITIONS", 1)  # One image at a time, each of which is lost in a sum of 600.
  x, kernel = jnp.ones((1000, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
  weights = jnp.ones((1000, *2 * (4 // stride,), 2))

  def gradient(dtype, lowering):
    apply = functools.partial(images.conv3x3, x.astype(dtype), stride=stride, lowering=lowering)
    return jax.vjp(apply, kernel.astype(dtype))[1](weights.astype(dtype))[0]

  actual = gradient(jnp.bfloat16, "matmul_gradient")
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_allclose(actual.astype(jnp.float32), gradient(jnp.float32, "lax"), rtol=0.01)


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


def convolutions_of_three_runs(size):
  """Returns the convolutions in the value and the gradients of three runs, and in those of one of them."""
  x, kernels, weights = operands(size, 1, kernels=(3,))
  apply = functools.partial(value_and_gradients, stride=1, lowering="lax_per_run")
  programs = (jax.vmap(apply, in_axes=(None, 0, None)), apply)
  texts = [jax.jit(p).lower(x, k, weights).as_text() for p, k in zip(programs, (kernels, kernels[0]), strict=True)]
  assert all("group_count = 3" not in text for text in texts)
  return [text.count("stablehlo.convolution(") for text in texts]


def test_large_batches_of_packed_runs_are_convolved_one_after_another():
  packed, alone = convolutions_of_three_runs((5, 4))  # Two images of 20 positions are 40.
  assert alone > 0
  assert packed == 3 * alone


def test_small_batches_of_packed_runs_share_a_matrix_product():
  assert convolutions_of_three_runs((4, 4)) == [0, 0]


def test_an_unknown_lowering_is_refused():
  for lowering in ("fft", "fft_per_run", "matmul_per_run", "_per_run"):
    with pytest.raises(ValueError, match=f"'{lowering}'"):
      images.conv3x3(jnp.zeros((1, 2, 2, 1)), jnp.zeros((3, 3, 1, 1)), lowering=lowering)


def test_the_automatic_lowering_depends_on_the_backend(monkeypatch):
  for backend, lowering in (("cpu", "matmul_gradient"), ("gpu", "lax"), ("tpu", "lax")):
    monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
    assert images.resolve_convolution("auto") == lowering
    assert images.resolve_convolution("matmul") == "matmul"
    assert images.resolve_convolution("pallas") == "lax"
    assert images.resolve_convolution("auto", packed=True) == f"{lowering}_per_run"
    assert images.resolve_convolution("pallas", packed=True) == "lax_per_run"
    assert images.resolve_convolution("matmul", packed=True) == "matmul"


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3)])
def test_max_pooling_drops_an_odd_last_row_or_column(size):
  x = normal((2, *size, 3))
  rows, columns = size[0] // 2, size[1] // 2
  cropped = np.asarray(x)[:, : 2 * rows, : 2 * columns]
  expected = cropped.reshape(2, rows, 2, columns, 2, 3).max(axis=(2, 4))
  np.testing.assert_array_equal(images.max_pool_2x2(x), expected)


def test_the_gradient_of_max_pooling_goes_to_the_maximum():
  x = jnp.asarray([[1.0, 5.0, 0.0], [2.0, 3.0, 9.0]]).reshape(1, 2, 3, 1)
  gradient = jax.grad(lambda x: jnp.sum(images.max_pool_2x2(x)))(x)
  np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1, 0], [0, 0, 0]])


def test_upsampling_repeats_every_position():
  x = normal((2, 2, 3, 2))
  np.testing.assert_array_equal(images.upsample_nearest(x), np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))


@pytest.mark.parametrize("side", [1, 2, 3])
def test_patches_are_stacked_row_by_row_and_spread_again(side):
  x = np.arange(2 * 6 * 12 * 3).reshape(2, 6, 12, 3)
  stacked = np.asarray(images.stack_patches(jnp.asarray(x), side))
  assert stacked.shape == (2, 6 // side, 12 // side, side * side * 3)
  for i in range(side):
    for j in range(side):
      channels = slice(3 * (i * side + j), 3 * (i * side + j + 1))
      np.testing.assert_array_equal(stacked[..., channels], x[:, i::side, j::side])
  np.testing.assert_array_equal(images.spread_patches(jnp.asarray(stacked), side), x)


def test_a_soft_clamp_is_odd_bounded_monotone_and_the_identity_near_zero():
  z = jnp.linspace(-30, 30, 601)
  clamped = np.asarray(images.soft_clamp(z, 3.0))
  assert (np.abs(clamped) <= 3).all()
  assert (np.diff(clamped) > -1e-6).all()
  np.testing.assert_allclose(clamped, -clamped[::-1], atol=1e-5)
  np.testing.assert_allclose(jax.grad(lambda z: images.soft_clamp(z, 3.0))(0.0), 1)
  # tanh(1) at z = s; twice is not once.
  np.testing.assert_allclose(images.soft_clamp(jnp.asarray(3.0), 3.0), 3 * np.tanh(1), rtol=1e-6)
  assert images.soft_clamp(images.soft_clamp(jnp.asarray(3.0), 3.0), 3.0) < 3 * np.tanh(1)
  np.testing.assert_array_equal(images.soft_clamp(z, 0.0), z)


def test_grey_and_rgb_stay_as_they_are():
  x = np.random.default_rng(0).integers(256, size=(2, 5, 6, 3), dtype=np.uint8)
  np.testing.assert_array_equal(images.to_rgb(x), x)
  np.testing.assert_array_equal(images.to_rgb(x[..., :1]), np.repeat(x[..., :1], 3, axis=-1))


@pytest.mark.parametrize("channels", [2, 4, 7, 10, images.MAX_CHANNELS])
def test_every_channel_has_a_colour(channels):
  one_each = 255 * np.eye(channels, dtype=np.uint8)[None]
  colors = images.to_rgb(one_each)
  assert (colors.shape, colors.dtype) == ((1, channels, 3), np.uint8)
  assert len({tuple(color) for color in colors[0].tolist()}) == channels
  assert colors.max(axis=-1).min() > 100  # All are visible on black.
  # Half the value is half as bright, and nothing is black.
  np.testing.assert_allclose(images.to_rgb(one_each // 2), colors / 2, atol=1)
  assert not images.to_rgb(0 * one_each).any()


def test_the_brightest_channel_wins_then_the_last():
  color = images.to_rgb(255 * np.eye(5, dtype=np.uint8)[None])[0]
  pixels = np.array([[255, 0, 255, 0, 0], [10, 255, 254, 0, 200], [255] * 5], np.uint8)
  np.testing.assert_array_equal(images.to_rgb(pixels[None])[0], color[[2, 1, 4]])
