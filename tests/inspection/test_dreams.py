from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.inspection import recording
from jedi_jax.runs import telemetry
from jedi_jax.training import dreams
from jedi_jax.types import Segment


@pytest.fixture(scope="module")
def segment(agent, episodes):
  return recording.windows(episodes, before=agent.model.conditioning_frames, after=4, stride=4)


def test_dreams_start_from_the_real_frame_and_take_the_real_actions(agent, segment):
  model, length = agent.model, agent.model.conditioning_frames
  keys = jax.random.split(jax.random.key(0), len(segment.mask))
  followed = jax.jit(lambda p, s, k: dreams.open_loop(model, p, s, k))(agent.params, segment, keys)
  played = jax.jit(lambda p, s, k: dreams.closed_loop(model, p, s, k))(agent.params, segment, keys)
  real = jax.jit(model.encode)(agent.params, segment.observations, segment.mask)
  for trajectory in (followed, played):
    assert trajectory.latents.shape[1] == 5
    np.testing.assert_allclose(trajectory.latents[:, 0], real[:, length - 1], atol=1e-6)
  np.testing.assert_array_equal(followed.actions, segment.actions[:, length - 1 : -1])
  assert np.any(np.asarray(played.actions) != np.asarray(followed.actions))


@pytest.fixture(scope="module")
def watched(agent, tiny):
  """The figures of the world model on a replay of noise, and the replay."""
  watch = jax.jit(dreams.make_watch(agent.model, steps=4, strips=3))
  replay = jax.tree.map(lambda x: x[0], jax.device_get(tiny.replay()))
  return jax.device_get(watch(agent.params, replay, jax.random.key(1))), replay


def test_strips_are_rows_of_real_and_imagined_frames(watched):
  figures, replay = watched
  got = figures["strips"]
  assert (got.shape, got.dtype) == ((6, 5, 24, 24, 3), np.uint8)
  shown = 0
  for real, dreamed in zip(got[::2], got[1::2], strict=True):
    black = [not np.any(frame) for frame in real]
    assert not black[0]
    # Once an episode is over nothing follows, in the dream either.
    assert black == sorted(black)
    assert black == [not np.any(frame) for frame in dreamed]
    for frame in real[: 5 - sum(black)]:
      assert np.any(np.all(frame.reshape(-1) == replay.frames, axis=-1))
      shown += 1
  assert shown > 3


def test_figures_of_the_world_model(watched):
  figures, _ = watched
  # Frames of noise: copying is off by the root of 2 deviations, and nothing can be predicted.
  np.testing.assert_allclose(figures["copying"], np.sqrt(2), rtol=0.1)
  assert np.all(figures["error"] > 0.9)
  for kind in ("reward", "end"):
    real, imagined = figures[f"{kind}_real"], figures[f"{kind}_imagined"]
    # The same steps on both; each of 64 segments has 1 to 4, and at most one end.
    np.testing.assert_array_equal(real.sum(axis=1), imagined.sum(axis=1))
    assert 64 <= real.sum() <= 4 * 64
  assert 5 < figures["end_real"][1].sum() <= 64
  summary = telemetry.world_model_summary(figures)
  assert set(summary) == {
    f"world_model/{name}" for name in ("f1_real", "f1_imagined", "error_1", "error_last", "calibration")
  }
  assert summary["world_model/error_1"] == pytest.approx(figures["error"][0] / figures["copying"][0])


def test_padding_does_not_count(agent, segment):
  """Whatever stands behind the mask, and in segments whose start is padding."""
  key, length = jax.random.key(0), agent.model.conditioning_frames

  @jax.jit
  def measure(segment):
    return dreams.compare(agent.model, agent.params, segment, key)[1], dreams.calibration(
      agent.model, agent.params, segment, key
    )

  mask = np.array(segment.mask)
  assert not np.all(mask[:, length:])
  mask[0, :length] = False
  before = measure(segment.replace(mask=mask))
  noise = np.random.default_rng(0).integers(256, size=segment.observations.shape, dtype=np.uint8)
  hidden = ~mask
  hidden[0] = True
  changed = segment.replace(
    observations=np.where(hidden[..., None, None, None], noise, segment.observations),
    rewards=np.where(hidden, 1.0, segment.rewards).astype(np.float32),
    mask=mask,
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), measure(changed), before)


class Guesser:
  """A model whose latents are the pixels and whose samples are the given ones."""

  conditioning_frames = 2

  def __init__(self, sample):
    self.dynamics = SimpleNamespace(
      sample_noise=lambda keys, frames: jnp.moveaxis(
        jax.vmap(lambda key: jax.random.normal(key, (frames, 4, 4, 3)))(keys), 1, 0
      ),
      sample=lambda params, past, actions, noise: sample(past[:, -1], noise),
    )

  def encode(self, params, observations, mask):
    return observations


def test_calibration_compares_variance_and_error():
  generator = np.random.default_rng(0)
  past = generator.normal(size=(300, 2, 4, 4, 3))
  following = past[:, -1:] + 0.3 * generator.normal(size=(300, 1, 4, 4, 3))
  segment = Segment(np.concatenate([past, following], axis=1), *[np.ones((300, 3))] * 3, np.ones((300, 3), bool))
  params, key = {"denoiser": {}}, jax.random.key(0)

  def calibration(sample):
    return float(dreams.calibration(Guesser(sample), params, segment, key))

  assert calibration(lambda last, noise: last + 0.3 * noise) == pytest.approx(1.0, abs=0.05)
  assert calibration(lambda last, noise: last) == 0
  # Half the deviation: s^2 (1 + 1/4) / (1 + s^2 / 4) with s = 1/2.
  assert calibration(lambda last, noise: last + 0.15 * noise) == pytest.approx(0.3125 / 1.0625, abs=0.03)
  assert calibration(lambda last, noise: last + 1.0 * noise) > 2


@pytest.mark.parametrize(("size", "factor"), [(2, 12), (10, 3), (23, 2), (24, 1), (64, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiling_keeps_rows_and_columns(size, factor, channels):
  strips = np.random.default_rng(0).integers(256, size=(2, 3, size, size + 1, channels), dtype=np.uint8)
  image = dreams.tile(strips)
  assert image.shape == (2 * size * factor, 3 * (size + 1) * factor, 3)
  small = image[::factor, ::factor]
  np.testing.assert_array_equal(image, small.repeat(factor, axis=0).repeat(factor, axis=1))
  np.testing.assert_array_equal(small[size:, -size - 1 :], np.broadcast_to(strips[1, 2], (size, size + 1, 3)))


def test_tiles_of_other_channels_are_in_colour():
  strips = np.zeros((1, 2, 10, 10, 4), np.uint8)
  strips[0, 1, 4, 5, 2] = 255
  image = dreams.tile(strips)
  assert image.shape == (30, 60, 3)
  assert np.argwhere(image.any(axis=-1)).min(axis=0).tolist() == [12, 45]
  assert image.any(axis=-1).sum() == 9


def test_the_run_showed_its_dreams(finished_run):
  data = b"".join(p.read_bytes() for p in (finished_run / "tensorboard").iterdir())
  assert data.count(b"dreams/real_over_imagined") >= 1
  assert b"PNG" in data
