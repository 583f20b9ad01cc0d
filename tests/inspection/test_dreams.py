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


def test_tiling_keeps_rows_and_columns():
  strips = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2, 1)
  image = dreams.tile(strips)
  assert image.shape == (4, 6, 1)
  np.testing.assert_array_equal(image[2:4, 4:6], strips[1, 2])


def test_the_run_showed_its_dreams(finished_run):
  data = b"".join(p.read_bytes() for p in (finished_run / "tensorboard").iterdir())
  assert data.count(b"dreams/real_over_imagined") >= 1
  assert b"PNG" in data
