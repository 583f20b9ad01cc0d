"""Episodes of DIAMOND and of Minari."""

import types

import numpy as np
import pytest
from refusals import refused
from torch_writer import STEPS, diamond_episode

from jedi_jax import datasets
from jedi_jax.interop import episodes


def place(files, folder):
  for number, file in enumerate(files):
    target = folder / "000" / "00" / str(number) / f"{number}.pt"
    target.parent.mkdir(parents=True)
    file.rename(target)
  (folder / "info.pt").write_bytes(b"not read")
  return folder


def test_an_episode_that_torch_saved(tmp_path):
  torch = pytest.importorskip("torch")
  flags = torch.tensor([0, 1], dtype=torch.uint8)
  saved = {
    "obs": torch.full((2, 3, 8, 7), 9, dtype=torch.uint8), "act": torch.tensor([1, 2]), "rew": torch.tensor([0.0, 1.0]),
    "end": flags, "trunc": 0 * flags, "info": {"final_observation": torch.full((3, 8, 7), 1.0)},
  }  # fmt: skip
  torch.save(saved, tmp_path / "0.pt")
  [episode] = episodes.read_diamond(tmp_path)
  assert episode.observations.shape == (3, 8, 7, 3)
  assert (episode.observations[1] == 9).all()
  assert (episode.observations[2] == 255).all()
  assert episode.ends


def test_episodes_of_diamond(pt, tmp_path):
  files = [diamond_episode(pt), diamond_episode(pt, ends=False), diamond_episode(pt, final=False, ends=False)]
  whole, cut, open_ = episodes.read_diamond(place(files, tmp_path / "train"))
  for episode in (whole, cut):
    assert episode.observations.shape == (STEPS + 1, 8, 7, 3)
    assert np.array_equal(episode.observations[:, 0, 0, 0], np.arange(STEPS + 1))
    assert np.array_equal(episode.actions, np.arange(STEPS))
  assert (whole.ends, cut.ends, open_.ends) == (True, False, False)
  # Its last step has no next frame.
  assert open_.observations.shape == (STEPS, 8, 7, 3)
  assert np.array_equal(open_.rewards, np.arange(STEPS - 1))
  shapes = {"obs": (0, 3, 8, 7), "act": 0, "rew": 0, "end": 0, "trunc": 0}
  none = {name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}
  assert list(episodes.read_diamond(place([diamond_episode(pt, **none)], tmp_path / "empty"))) == []
  again = episodes.read_diamond(tmp_path / "train")
  assert datasets.write(tmp_path / "data", again, num_actions=STEPS) == (3, 3 * STEPS - 1)
  assert datasets.read(tmp_path / "data").episodes[1].ends is False


def test_files_that_are_no_episodes_of_diamond_are_refused(pt, tmp_path):
  refused(lambda: list(episodes.read_diamond(tmp_path / "nothing")), "nothing", "no episodes")
  folder = place([diamond_episode(pt, act=np.zeros(2, np.int64))], tmp_path / "short")
  refused(lambda: list(episodes.read_diamond(folder)), "0.pt", "act of (2,)")
  folder = place([pt.save({"obs": np.zeros((2, 3, 4, 4), np.uint8)})], tmp_path / "less")
  refused(lambda: list(episodes.read_diamond(folder)), "0.pt", "no act")
  next(folder.rglob("0.pt")).write_bytes(b"PK")
  refused(lambda: list(episodes.read_diamond(folder)), "0.pt", "not a readable PyTorch file")


class Standin:
  """What is used of `minari.MinariDataset`."""

  def __init__(self, observations, *, start=0, n=4):
    self.action_space = types.SimpleNamespace(n=np.int64(n), start=start)
    self._observations = observations

  def iterate_episodes(self):
    for last in (True, False):
      yield types.SimpleNamespace(
        observations=self._observations,
        actions=np.arange(3) + self.action_space.start,
        rewards=np.asarray([0.0, 1.0, -1.0]),
        terminations=np.asarray([False, False, last]),
        truncations=np.asarray([False, False, not last]),
      )


IMAGES = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)


@pytest.mark.parametrize(("dataset", "key"), [(Standin(IMAGES, start=2), ""), (Standin({"image": IMAGES}), "image")])
def test_episodes_of_minari(dataset, key):
  first, second = episodes.read_minari(dataset, key=key)
  assert np.array_equal(first.observations, IMAGES[..., None])
  assert np.array_equal(first.actions, [0, 1, 2])
  assert (first.ends, second.ends) == (True, False)
  assert episodes.minari_actions(dataset) == 4


def test_unfit_data_sets_of_minari_are_refused():
  box = types.SimpleNamespace(action_space="Box(2,)")
  refused(lambda: list(episodes.read_minari(box)), "Box(2,)", "discrete")
  refused(lambda: list(episodes.read_minari(Standin({"image": IMAGES}), key="imag")), "'imag'", "nearest: image")
  refused(lambda: list(episodes.read_minari(Standin(IMAGES), key="image")), "no dictionaries")


def test_a_data_set_that_minari_wrote(tmp_path, monkeypatch):
  minari = pytest.importorskip("minari")
  pytest.importorskip("h5py")
  import gymnasium
  from minari.data_collector import EpisodeBuffer

  monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
  frames = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
  buffers = [
    EpisodeBuffer(
      id=i, observations=list(frames), actions=[1, 2, 1], rewards=[0.0, 1.0, 0.0],
      terminations=[False, False, True], truncations=[False] * 3, infos={},
    )
    for i in range(2)
  ]  # fmt: skip
  minari.create_dataset_from_buffers(
    "jedi/test-v0", buffers, action_space=gymnasium.spaces.Discrete(2, start=1),
    observation_space=gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8), jpeg_encoding=False,
  )  # fmt: skip
  first, _ = episodes.read_minari(episodes.load_minari("jedi/test-v0"))
  assert np.array_equal(first.observations, frames)
  assert np.array_equal(first.actions, [0, 1, 0])
  assert first.ends
  refused(lambda: episodes.load_minari("jedi/none-v0"), "jedi/none-v0", "not found")
