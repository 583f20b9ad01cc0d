"""Replays of recorded episodes."""

import jax
import numpy as np
import pytest
from replay_reference import END, SHAPE, SLOTS, TRUNCATE, Reference, check, single

from jedi_jax import replay
from jedi_jax.errors import UserError


def recorded(reference):
  """The reference's episodes of the first stream, as a user would give them."""
  episodes = []
  for episode in reference.episodes()[0]:
    steps = episode.slots[:-1]
    frames = np.asarray([slot.name for slot in episode.slots], np.uint8).reshape(-1, *SHAPE)
    episodes.append(replay.Episode(frames, [s.action for s in steps], [s.reward for s in steps], steps[-1].end))
  return episodes


@pytest.mark.parametrize("slots", [SLOTS, 16, 9])
def test_recorded_episodes_are_stored_as_a_collector_stores_them(slots):
  script = single(3, 5, 2) + single(4, 1, outcome=TRUNCATE) + single(6)
  episodes = recorded(Reference(1, size=16).play(script))
  assert [len(episode.actions) for episode in episodes] == [3, 5, 2, 4, 1, 6]
  reference = Reference(1, size=4, slots=slots).play(script)
  state = replay.from_episodes(episodes, capacity=slots)
  jax.tree.map(np.testing.assert_array_equal, state, reference.state)
  reference.state = state
  check(reference)


def test_recorded_episodes_are_all_stored_unless_there_is_less_room():
  reference = Reference(1, size=16).play(single(3, 5))
  reference.state = replay.from_episodes(recorded(reference))
  assert reference.state.actions.shape == (1, 4 + 6)
  reference.ring = 10
  assert reference.table() == [((0, 0, 0), 3, True), ((0, 1, 0), 5, True)]
  check(reference)


def test_more_recorded_steps_than_a_chunk_takes(monkeypatch):
  monkeypatch.setattr(replay, "_CHUNK_SLOTS", 4)
  episodes = recorded(Reference(1, size=16).play(single(9, 2, 7)))
  reference = Reference(1, size=16).play(single(9, 2, 7))
  jax.tree.map(np.testing.assert_array_equal, replay.from_episodes(episodes, capacity=SLOTS), reference.state)


@pytest.mark.parametrize("outcome", [END, TRUNCATE])
def test_recorded_episodes_may_be_mappings_and_ends_one_flag_per_step(outcome):
  episodes = recorded(Reference(1, size=16).play(single(3, 4, outcome=outcome)))
  expected = replay.from_episodes(episodes)
  assert bool(np.any(expected.ends)) == (outcome == END)
  mappings = [episode._asdict() for episode in episodes]
  for mapping in mappings:
    mapping["ends"] = np.asarray([False] * (len(mapping["actions"]) - 1) + [outcome == END])
  jax.tree.map(np.testing.assert_array_equal, replay.from_episodes(mappings), expected)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("observations", np.zeros((4, 1, 1, 3)), "episode 1 has observations of float64"),
    ("observations", np.zeros((4, 3), np.uint8), "give uint8 of shape"),
    ("observations", np.zeros((3, 1, 1, 3), np.uint8), "3 observations and actions of int64 .3,.*final frame included"),
    ("observations", np.zeros((4, 2, 1, 3), np.uint8), r"episode 1 has frames of shape \(2, 1, 3\) and episode 0 of"),
    ("actions", np.zeros(3), "T integer actions"),
    ("actions", np.zeros((3, 1), int), "T integer actions"),
    ("rewards", np.zeros(4), "give 3 finite numbers"),
    ("rewards", np.asarray([0.0, np.nan, 0.0]), "give 3 finite numbers"),
    ("rewards", np.asarray(["a", "b", "c"]), "give 3 finite numbers"),
    ("ends", np.asarray([True, False, False]), "whether its last step"),
    ("ends", 0.5, "whether its last step"),
  ],
)
def test_malformed_episodes_are_refused(field, value, message):
  good, bad = recorded(Reference(1, size=16).play(single(3, 3)))
  with pytest.raises(UserError, match=message) as error:
    replay.from_episodes([good, bad._replace(**{field: value})])
  assert "\n" not in str(error.value)


def test_missing_fields_episodes_and_room_are_refused():
  (episode,) = recorded(Reference(1, size=16).play(single(3)))
  with pytest.raises(UserError, match="episode 0 lacks ends: give observations, actions, rewards, ends"):
    replay.from_episodes([{name: value for name, value in episode._asdict().items() if name != "ends"}])
  with pytest.raises(UserError, match="no episodes"):
    replay.from_episodes([])
  with pytest.raises(UserError, match="capacity=1"):
    replay.from_episodes([episode], capacity=1)
