import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_layers import normal, random_params

from jedi_jax.nn.encoder import EncoderNetwork
from jedi_jax.ops.images import stack_patches


@pytest.mark.parametrize("downsample", [(True, True), (False, True), (False, False)])
def test_the_encoder_halves_where_it_pools(downsample):
  network = EncoderNetwork(channels=(4, 6), downsample=downsample)
  shape = jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x)[0], jnp.zeros((2, 8, 12, 3))).shape
  factor = 2 ** sum(downsample)
  assert shape == (2, 8 // factor, 12 // factor, 6)


def test_the_encoder_reads_patches():
  x = normal((2, 8, 12, 3))
  patched = EncoderNetwork(channels=(4, 6), downsample=(True, False), patch=2)
  params = random_params(patched, x)
  plain = EncoderNetwork(channels=(4, 6), downsample=(True, False))
  output = patched.apply({"params": params}, x)
  assert output.shape == (2, 2, 3, 6)
  np.testing.assert_allclose(output, plain.apply({"params": params}, stack_patches(x, 2)), rtol=1e-5, atol=1e-6)
