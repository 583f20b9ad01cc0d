"""Data sets on disk: what is written is read, and mistakes in them are one line that names the file."""

import json
import zipfile

import numpy as np
import pytest
from refusals import refused

import jedi_jax
from jedi_jax import datasets, replay
from jedi_jax.envs import RECORDED

SHAPE = (6, 5, 2)


def episode(steps, seed=0, ends=True):
  random = np.random.default_rng(seed)
  return replay.Episode(
    random.integers(0, 256, (steps + 1, *SHAPE), np.uint8),
    random.integers(0, 3, steps),
    random.normal(size=steps),
    ends,
  )


EPISODES = [episode(3 + i % 4, i, ends=i % 3 > 0) for i in range(25)]


@pytest.fixture
def folder(tmp_path):
  datasets.write(tmp_path / "data", EPISODES, num_actions=3, source="noise")
  return tmp_path / "data"


def test_what_is_written_is_read(folder):
  data = datasets.read(folder)
  assert (data.spec, data.source) == (jedi_jax.EnvSpec(3, SHAPE), "noise")
  assert len(data.episodes) == len(EPISODES)
  for ours, theirs in zip(data.episodes, EPISODES, strict=True):
    assert np.array_equal(ours.observations, theirs.observations)
    assert np.array_equal(ours.actions, theirs.actions)
    assert np.array_equal(ours.rewards, theirs.rewards.astype(np.float32))
    assert ours.ends == theirs.ends
    assert ours.rewards.dtype == np.float32


def test_the_last_tenth_is_held_out(folder):
  data = datasets.read(folder)
  assert (len(data.training), len(data.held_out)) == (23, 2)
  assert data.training + data.held_out == data.episodes
  assert data.steps == sum(len(e.actions) for e in EPISODES[:23])
  assert data.frames == data.steps + 23
  few = data._replace(episodes=data.episodes[:2])
  assert (len(few.training), len(few.held_out)) == (1, 1)


def test_the_fingerprint_is_that_of_the_content(folder, tmp_path):
  data = datasets.read(folder)
  datasets.write(tmp_path / "again", data.episodes, num_actions=3)
  again = datasets.read(tmp_path / "again")
  assert again.record()["fingerprint"] == data.record()["fingerprint"]
  changed = data.episodes[0].rewards.copy()
  changed[0] += 1
  other = data._replace(episodes=(data.episodes[0]._replace(rewards=changed), *data.episodes[1:]))
  assert other.record()["fingerprint"] != data.record()["fingerprint"]


def test_replay_gives_its_episodes_back(folder):
  data = datasets.read(folder)
  whole = list(replay.to_episodes(replay.from_episodes(data.episodes)))
  for ours, theirs in zip(whole, data.episodes, strict=True):
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
  # A ring that has wrapped: the newest episodes are whole.
  *_, last = replay.to_episodes(replay.from_episodes(data.episodes, capacity=17))
  assert np.array_equal(last.observations, data.episodes[-1].observations)
  assert np.array_equal(last.rewards, data.episodes[-1].rewards)


def test_nothing_is_left_of_a_data_set_that_cannot_be_written(tmp_path):
  wrong = EPISODES[1]._replace(actions=EPISODES[1].actions + 3)
  refused(lambda: datasets.write(tmp_path / "a", [EPISODES[0], wrong], num_actions=3), "episode 1", "from 0 to 2")
  other = episode(3)._replace(observations=np.zeros((4, 6, 5, 3), np.uint8))
  refused(lambda: datasets.write(tmp_path / "a", [EPISODES[0], other], num_actions=3), "episode 1", "(6, 5, 3)")
  refused(lambda: datasets.write(tmp_path / "a", [], num_actions=3), "no episodes")
  assert not any(tmp_path.iterdir())
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "precious").write_text("x")
  refused(lambda: datasets.write(tmp_path / "mine", EPISODES, num_actions=3), "mine", "not an empty directory")
  assert (tmp_path / "mine" / "precious").read_text() == "x"


STEPS = 4
FINE = {
  "observations": np.zeros((STEPS + 1, *SHAPE), np.uint8), "actions": np.zeros(STEPS, np.int64),
  "rewards": np.zeros(STEPS, np.float32), "terminated": np.asarray(True), "truncated": np.asarray(False),
}  # fmt: skip
WRONG = {
  "float frames": ({"observations": np.zeros((5, *SHAPE), np.float32)}, "uint8"),
  "flat frames": ({"observations": np.zeros((5, 60), np.uint8)}, "uint8"),
  "frames of another shape": ({"observations": np.zeros((5, 5, 6, 2), np.uint8)}, "(5, 6, 2)"),
  "no final frame": ({"observations": np.zeros((4, *SHAPE), np.uint8)}, "final frame"),
  "no steps": (
    {"observations": np.zeros((1, *SHAPE), np.uint8), "actions": np.zeros(0, int), "rewards": np.zeros(0)},
    "final frame",
  ),
  "float actions": ({"actions": np.zeros(STEPS)}, "integer actions"),
  "an action too large": ({"actions": np.full(STEPS, 3)}, "from 0 to 2"),
  "a negative action": ({"actions": np.full(STEPS, -1)}, "from 0 to 2"),
  "NaN rewards": ({"rewards": np.full(STEPS, np.nan)}, "finite"),
  "huge rewards": ({"rewards": np.full(STEPS, 1e300)}, "float32"),
  "too few rewards": ({"rewards": np.zeros(STEPS - 1)}, "rewards"),
  "a flag a step": ({"terminated": np.zeros(STEPS, bool)}, "terminated"),
  "an integer flag": ({"truncated": np.asarray(0)}, "truncated"),
  "objects": ({"actions": np.asarray([{}] * STEPS, object)}, "not a readable .npz"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_episode_names_its_file(folder, name):
  arrays, part = WRONG[name]
  np.savez(folder / "episode_000007.npz", **{**FINE, **arrays})
  refused(lambda: datasets.read(folder), "episode_000007.npz", part)


def test_a_file_without_an_array_is_refused(folder):
  np.savez(folder / "episode_000007.npz", **{name: x for name, x in FINE.items() if name != "rewards"})
  refused(lambda: datasets.read(folder), "episode_000007.npz", "lacks rewards")


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "array", "folder"])
def test_a_damaged_file_is_named(folder, damage):
  file = folder / "episode_000003.npz"
  content = bytearray(file.read_bytes())
  file.unlink()
  if damage == "cut":
    file.write_bytes(content[: len(content) // 2])
  elif damage == "flipped":
    with zipfile.ZipFile(folder / "episode_000004.npz") as archive:
      start = archive.getinfo("observations.npy").header_offset + 200
    content[start : start + 40] = bytes(40)
    file.write_bytes(content)
  elif damage == "array":
    with file.open("wb") as out:
      np.save(out, np.zeros(3))
  elif damage == "folder":
    file.mkdir()
  else:
    file.write_text("no archive" if damage == "text" else "")
  refused(lambda: datasets.read(folder), "episode_000003.npz", "not a readable .npz")


@pytest.mark.parametrize(
  ("change", "parts"),
  [
    ({"version": 2}, ["version 2", "newer"]),
    ({"version": "1"}, ["version '1'"]),
    ({"num_actions": 0}, ["num_actions 0"]),
    ({"num_actions": True}, ["num_actions"]),
    ({"observation_shape": [6, 5]}, ["observation_shape"]),
    ({"observation_shape": [6, 5, -2]}, ["observation_shape"]),
    ({"observation_shape": None}, ["observation_shape"]),
  ],
)
def test_a_wrong_description_is_refused(folder, change, parts):
  file = folder / "dataset.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
  refused(lambda: datasets.read(folder), "dataset.json", *parts)


def test_a_folder_without_data_is_refused(folder, tmp_path):
  refused(lambda: datasets.read(tmp_path / "missing"), "missing", "no data set")
  (tmp_path / "empty").mkdir()
  refused(lambda: datasets.read(tmp_path / "empty"), "empty", "no data set")
  for text in ("{", "[1]", "\x00"):
    (folder / "dataset.json").write_text(text)
    refused(lambda: datasets.read(folder), "dataset.json")
  info = {"version": 1, "num_actions": 3, "observation_shape": list(SHAPE)}
  (tmp_path / "empty" / "dataset.json").write_text(json.dumps(info))
  refused(lambda: datasets.read(tmp_path / "empty"), "empty", "0 episodes")


def test_the_configuration_of_a_run_on_data(folder):
  data = datasets.read(folder)
  config = datasets.make_config(data, preset="debug")
  assert config.env.name == RECORDED
  assert config.training.updates.actor_critic == config.training.first_updates.actor_critic == 0
  assert config.replay.capacity >= data.frames
  assert config.replay.age_weights == (1.0,)
  # As many epochs as a run of the preset: 1, then 60 steps in 3 epochs, and a final one.
  assert config.training.final_epochs == 4
  config = datasets.make_config(data, preset="debug", policy=True, epochs=2, overrides=["replay.capacity=20"])
  assert (config.training.final_epochs, config.replay.capacity) == (1, 20)
  assert config.training.updates.actor_critic == 2


def test_settings_that_data_determine_are_refused(folder):
  data = datasets.read(folder)
  refused(
    lambda: datasets.make_config(data, overrides=["collect.total_steps=9"]), "collect.total_steps", "leave it out"
  )
  refused(lambda: datasets.make_config(data, overrides={"env.num_envs": 2}), "env.num_envs")
  refused(lambda: datasets.make_config(data, overrides={"training.updates.actor_critic": 2}), "--policy")
  refused(lambda: datasets.make_config(data, epochs=0), "epochs=0")
  refused(lambda: datasets.make_config(data, epochs=4, overrides=["training.final_epochs=9"]), "training.final_epochs")


def test_another_configuration_is_refused(folder, tmp_path):
  data = datasets.read(folder)
  catch = jedi_jax.make_config(env="catch", preset="debug")
  refused(lambda: jedi_jax.train(catch, tmp_path / "run", data=data), "make_config(data")
  less = datasets.make_config(data._replace(episodes=data.episodes[:9]), preset="debug")
  refused(lambda: jedi_jax.train(less, tmp_path / "run", data=data), "make_config(data")
  refused(lambda: jedi_jax.train(less, tmp_path / "run"), "recorded episodes", "train_offline.py")
  assert not (tmp_path / "run").exists()


def test_recorded_episodes_are_no_environment():
  refused(lambda: jedi_jax.envs.make(RECORDED, num_envs=1, seed=0), "recorded episodes")
  refused(lambda: jedi_jax.envs.register(RECORDED, jedi_jax.EnvSpec(2, (8, 8, 1)), lambda **_: None), "recorded")
  assert RECORDED not in jedi_jax.envs.names()
