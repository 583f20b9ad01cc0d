import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from jedi_jax.errors import UserError
from jedi_jax.inspection import film, recording
from jedi_jax.ops import images


@pytest.fixture(scope="module")
def shot(agent, episodes):
  segment = recording.windows(episodes[:3], before=agent.model.conditioning_frames, after=12, stride=12)
  return segment, film.shoot(agent, segment, seed=2)


def test_the_first_pane_is_the_real_game(shot, agent, episodes):
  _, got = shot
  assert got.frames.shape == (3, 3, 13, 24, 24, 3)
  for take, episode in enumerate(episodes[:3]):
    np.testing.assert_array_equal(got.frames[0, take, :10], episode.observations)
    np.testing.assert_array_equal(got.shown[0, take], np.arange(13) < 10)
    np.testing.assert_array_equal(got.rewards[0, take, 1:10], np.sign(episode.rewards))
    np.testing.assert_array_equal(got.ends[0, take, 1:10], episode.ends)
  # All three panes begin with the critic's view of one and the same frame.
  np.testing.assert_allclose(got.values[1:, :, 0], got.values[:1, :, 0].repeat(2, axis=0), atol=1e-4)
  assert np.all(got.shown[1:, :, :2])
  assert np.all((got.ends >= 0) & (got.ends <= 1))
  assert np.all(np.abs(got.rewards) <= 1)


def test_frames_are_drawn_for_as_long_as_a_pane_lasts(shot):
  _, got = shot
  images = film.draw(got, size=40)
  assert len(images) == sum(int(got.shown[:, take].sum(axis=1).max()) for take in range(3))
  width, height = images[0].size
  assert width > 3 * 48  # Twice 24, in three panes.
  assert height > 48
  # The picture itself is there, enlarged by a whole factor.
  corner = np.asarray(images[0])[6 : 6 + 48, 6 : 6 + 48]
  np.testing.assert_array_equal(corner[::2, ::2], got.frames[0, 0, 0])


def test_boards_of_other_channels_are_drawn_in_colour(shot):
  board = np.zeros((3, 1, 1, 10, 10, 7), np.uint8)
  board[..., 3, 4, 5] = 255
  one = jax.tree.map(lambda x: x[:, :1, :1], shot[1])
  [image] = film.draw(one._replace(frames=board), size=40)
  pane = np.asarray(image)[6 : 6 + 40, 6 : 6 + 40]
  assert np.argwhere(pane.any(axis=-1)).min(axis=0).tolist() == [12, 16]
  np.testing.assert_array_equal(pane[::4, ::4], images.to_rgb(board[0, 0, 0]))


def test_a_gif_is_written_and_small(shot, tmp_path):
  images = film.draw(shot[1], size=40)
  film.write(images, tmp_path / "new" / "dream.gif", frames_per_second=10)
  with Image.open(tmp_path / "new" / "dream.gif") as written:
    assert 1 < written.n_frames <= len(images)  # Equal successive frames are merged.
    assert written.size == images[0].size
    assert written.info["duration"] % 100 == 0
  film.write(images, tmp_path / "fast.gif", frames_per_second=60)
  with Image.open(tmp_path / "fast.gif") as written:
    assert written.info["duration"] % 20 == 0
  assert (tmp_path / "new" / "dream.gif").stat().st_size < 200_000


def test_what_cannot_be_written_is_one_line(shot, tmp_path, monkeypatch):
  images = film.draw(shot[1], size=40)
  with pytest.raises(UserError, match="neither"):
    film.write(images, tmp_path / "dream.avi", frames_per_second=10)
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write"):
    film.write(images, tmp_path / "file" / "dream.gif", frames_per_second=10)
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(UserError, match="ffmpeg"):
    film.write(images, tmp_path / "dream.mp4", frames_per_second=10)


def test_without_a_decoder_there_is_no_film(agent, shot):
  blind = type(agent)(dataclasses.replace(agent.model, decode=None), agent.params, agent.config)
  with pytest.raises(UserError, match="probe"):
    film.shoot(blind, jax.tree.map(lambda x: x[:1], shot[0]))
