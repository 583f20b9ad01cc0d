import jax
import numpy as np
import pytest

from jedi_jax.inspection import recording
from jedi_jax.training import dreams


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


def test_strips_are_rows_of_real_and_imagined_frames(agent, tiny):
  model = agent.model
  strips = jax.jit(dreams.make_strips(model, count=3, steps=4))
  replay = jax.tree.map(lambda x: x[0], jax.device_get(tiny.replay()))
  got = np.asarray(strips(agent.params, replay, jax.random.key(1)))
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
