import functools
from typing import NamedTuple

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jedi_jax import replay
from jedi_jax.errors import UserError

SLOTS = 32
SHAPE = (1, 1, 3)  # A frame is its own name: (stream, episode of the stream, time in the episode).
GO_ON, END, TRUNCATE = 0, 1, 2

# Compiling is most of what these tests take, so settings are few, and LLVM's optimisations are left out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
add = jit(replay.add)
sample = jit(replay.sample, static_argnames=("length", "age_weights", "beyond_end", "final_frames"))
WEIGHTS = (0.1, 0.1, 0.1, 0.7)


class Slot(NamedTuple):
  """What the ring must hold of one frame."""

  name: tuple[int, int, int]
  action: int
  reward: float
  end: bool
  final: bool


class Episode(NamedTuple):
  """What must survive of one episode.

  Attributes:
    began: global time of its first step, before anything was lost.
    slots: surviving frames, oldest first.
  """

  began: int
  slots: list[Slot]

  @property
  def steps(self):
    return sum(not slot.final for slot in self.slots)


class Reference:
  """Plays scripted episodes into a replay and, in plain Python, into lists.

  Args:
    num_streams: S.
    size: slots of a chunk.
  """

  def __init__(self, num_streams, size, slots=SLOTS):
    self.state = replay.init(num_streams=num_streams, slots_per_stream=slots, observation_shape=SHAPE)
    self.writer = replay.ChunkWriter(num_streams=num_streams, size=size, observation_shape=SHAPE)
    self.ring = slots
    self.streams = [[] for _ in range(num_streams)]
    self.began = {}
    self.episode = [0] * num_streams
    self.time = [0] * num_streams
    self.now = 0

  def step(self, outcomes):
    """Takes one step in every stream; outcomes [S] of GO_ON, END, TRUNCATE."""
    count = len(self.streams)
    names = [(s, self.episode[s], self.time[s]) for s in range(count)]
    actions = [1 + (7 * self.now + s) % 5 for s in range(count)]
    rewards = [1.0 + self.now + 1000 * s for s in range(count)]  # A name as well: no two steps share one.
    for s, outcome in enumerate(outcomes):
      self.began.setdefault(names[s][:2], self.now)
      self.streams[s].append(Slot(names[s], actions[s], rewards[s], outcome == END, final=False))
      self.time[s] += 1
      if outcome != GO_ON:
        final = (s, self.episode[s], self.time[s])
        self.streams[s].append(Slot(final, 0, 0.0, end=False, final=True))
        self.episode[s], self.time[s] = self.episode[s] + 1, 0
    following = [(s, name[1], name[2] + 1) for s, name in enumerate(names)]
    self.now += 1
    frames, next_frames = (np.asarray(x, np.uint8).reshape(count, *SHAPE) for x in (names, following))
    ends, truncated = (np.asarray([outcome == kind for outcome in outcomes]) for kind in (END, TRUNCATE))
    self.writer.add(frames, np.asarray(actions), np.asarray(rewards, np.float32), ends, truncated, next_frames)
    if self.writer.is_full:
      self.flush()

  def play(self, script):
    for outcomes in script:
      self.step(outcomes)
    self.flush()
    return self

  def flush(self):
    self.state = add(self.state, self.writer.flush())

  def episodes(self):
    """Surviving episodes of each stream, oldest first; an episode of which only the final frame is left is gone."""
    surviving = []
    for stream in self.streams:
      groups = {}
      for slot in stream[-self.ring :]:
        groups.setdefault(slot.name[:2], []).append(slot)
      episodes = [Episode(self.began[name], slots) for name, slots in groups.items()]
      surviving.append([episode for episode in episodes if episode.steps])
    return surviving

  def table(self):
    """What the replay's table says of each episode, in its order: (stream, first time, steps, closed)."""
    state = jax.tree.map(np.asarray, self.state)
    rows = []
    for i in range(int(state.num_episodes)):
      stream, position = int(state.episode_stream[i]), int(state.episode_start[i]) % self.ring
      name = tuple(state.observations(stream, position)[0, 0].tolist())
      rows.append((name, int(state.episode_steps[i]), bool(state.episode_closed[i])))
    return rows


def single(*lengths, outcome=END):
  """Script of one stream with episodes of these lengths; a negative length stays open."""
  return [(outcome if t == length - 1 else GO_ON,) for length in lengths for t in range(abs(length))]


def scripts(num_streams, max_size=60):
  outcome = st.sampled_from([GO_ON] * 6 + [END, END, TRUNCATE])
  return st.lists(st.tuples(*[outcome] * num_streams), min_size=1, max_size=max_size)


def draw(state, count=64, seed=0, **settings):
  keys = jax.random.split(jax.random.key(seed), count)
  segments = sample(state, keys, age_weights=WEIGHTS, **settings)
  return jax.tree.map(np.asarray, segments)


def times(segments, index=2):
  """Entry `index` of the frames' names, [B, T]."""
  return segments.observations[:, :, 0, 0, index].astype(int)


def check_segment(row, segments, episodes, *, length, beyond_end, final_frames):
  """One segment is a run of frames of one surviving episode, and padding around it."""
  mask = segments.mask[row]
  assert mask.shape == (length,)
  real = np.flatnonzero(mask)
  first, last = real[0], real[-1]
  assert mask[first : last + 1].all()
  names = [tuple(frame) for frame in segments.observations[row, real, 0, 0].tolist()]
  slots = episodes[names[0][:2]].slots
  start = [slot.name for slot in slots].index(names[0])
  run = slots[start : start + len(names)]
  assert [slot.name for slot in run] == names
  assert segments.actions[row, real].tolist() == [slot.action for slot in run]
  assert segments.rewards[row, real].tolist() == [slot.reward for slot in run]
  assert segments.ends[row, real].tolist() == [slot.end for slot in run]
  # Padding begins where nothing of the episode is left, and not before.
  if first > 0:
    assert start == 0
  if last < length - 1:
    assert beyond_end
    assert start + len(run) == len(slots)
  assert not segments.actions[row, ~mask].any()
  assert not segments.rewards[row, ~mask].any()
  assert not segments.ends[row, ~mask].any()
  if not (beyond_end or final_frames):
    assert not any(slot.final for slot in run)


def check_table(reference):
  """The table lists what survives; within a stream in order of age."""
  table = reference.table()
  assert int(reference.state.num_episodes) == len(table)
  for stream, episodes in enumerate(reference.episodes()):
    expected = [(e.slots[0].name, e.steps, e.slots[-1].final) for e in episodes]
    assert [row for row in table if row[0][0] == stream] == expected


def check(reference, seed=0):
  """The replay holds what the reference holds, and draws segments of it only."""
  check_table(reference)
  episodes = {e.slots[0].name[:2]: e for stream in reference.episodes() for e in stream}
  for length, beyond_end, final_frames in ((4, False, False), (4, False, True), (6, True, True), (6, True, False)):
    settings = {"length": length, "beyond_end": beyond_end, "final_frames": final_frames}
    segments = draw(reference.state, seed=seed, **settings)
    for row in range(len(segments.mask)):
      check_segment(row, segments, episodes, **settings)


# ---- Against plain Python ----


@pytest.mark.parametrize("num_streams", [1, 3])
def test_random_episodes_are_stored_and_drawn_as_plain_python_does(num_streams):
  @hypothesis.settings(deadline=None, max_examples=20)
  @hypothesis.given(script=scripts(num_streams), seed=st.integers(0, 1000))
  def run(script, seed):
    check(Reference(num_streams, size=4).play(script), seed)

  run()


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(script=scripts(1))
def test_chunk_boundaries_do_not_matter(script):
  small, large = (Reference(1, size).play(script) for size in (4, 16))
  assert small.table() == large.table()
  for name in ("frames", "actions", "rewards", "ends", "written", "open_episode", "num_episodes"):
    np.testing.assert_array_equal(getattr(small.state, name), getattr(large.state, name))
  settings = {"length": 4, "beyond_end": False, "final_frames": True}
  for a, b in zip(
    jax.tree.leaves(draw(small.state, **settings)), jax.tree.leaves(draw(large.state, **settings)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


# ---- The ring ----


def test_the_ring_keeps_the_newest_and_an_episode_loses_its_head():
  # 11 + 21 + 4 slots in a ring of 32: the first episode loses 4 of its 10 steps.
  reference = Reference(1, size=4).play(single(10, 20, -4))
  assert reference.table() == [((0, 0, 4), 6, True), ((0, 1, 0), 20, True), ((0, 2, 0), 4, False)]
  check(reference)


def test_an_episode_of_which_only_the_final_frame_is_left_is_gone():
  # An episode of 3 slots (2 steps and the final frame), then an open one. With 30 slots of it the ring of 32 has room
  # for a step and the final frame, with 31 for the final frame only.
  for steps, survivors in ((30, [(0, 0, 1), (0, 1, 0)]), (31, [(0, 1, 0)]), (32, [(0, 1, 0)])):
    reference = Reference(1, size=4).play(single(2, -steps))
    assert [name for name, _, _ in reference.table()] == survivors
    check(reference)


@pytest.mark.parametrize("ends", [False, True])
def test_an_episode_may_be_longer_than_the_ring(ends):
  steps = 2 * SLOTS + 5
  reference = Reference(1, size=16).play(single(3, steps if ends else -steps))
  kept = SLOTS - 1 if ends else SLOTS
  assert reference.table() == [((0, 1, steps - kept), kept, ends)]
  check(reference)


def test_episodes_go_on_after_the_ring_is_full_for_long():
  reference = Reference(3, size=4)
  rng = np.random.default_rng(0)
  for _ in range(4):
    reference.play(rng.choice([GO_ON, GO_ON, GO_ON, END, TRUNCATE], (40, 3)).tolist())
    check(reference)


def test_the_table_has_room_for_the_shortest_episodes():
  reference = Reference(3, size=4).play([(END,) * 3] * 50)
  # Each takes two slots.
  assert int(reference.state.num_episodes) == 3 * SLOTS // 2
  check(reference)


def test_streams_may_advance_differently():
  # A stream that ends at every step writes twice as many slots as one that goes on.
  reference = Reference(3, size=4).play([(END, GO_ON, TRUNCATE)] * 20)
  np.testing.assert_array_equal(reference.state.written, [40, 20, 40])
  check(reference)


# ---- Age ----


def test_the_table_is_in_order_of_age_over_streams():
  reference = Reference(2, size=2).play([(GO_ON, END), (END, GO_ON), (GO_ON, GO_ON), (GO_ON, END), (END, GO_ON)])
  began = [reference.began[name[:2]] for name, _, _ in reference.table()]
  assert began == sorted(began) == [0, 0, 1, 2, 4]
  assert [name[:2] for name, _, _ in reference.table()] == [(0, 0), (1, 0), (1, 1), (0, 1), (1, 2)]


def test_final_frames_do_not_put_the_streams_out_of_step():
  # Stream 0 ends at times 0, 1 and 2 and begins its fourth episode at time 3, in slot 6 of the chunk. Stream 1 ends at
  # time 3 and begins its second at time 4, in slot 5.
  script = [(END, GO_ON), (END, GO_ON), (END, GO_ON), (GO_ON, END), (GO_ON, GO_ON)]
  reference = Reference(2, size=16).play(script)
  began = [reference.began[name[:2]] for name, _, _ in reference.table()]
  assert began == sorted(began)


# ---- What is drawn ----


def frequencies(values, size):
  return np.bincount(values, minlength=size) / len(values)


def assert_frequencies(values, probabilities):
  """Within four standard errors of each probability."""
  probabilities = np.asarray(probabilities, float)
  error = np.sqrt(probabilities * (1 - probabilities) / len(values))
  np.testing.assert_array_less(np.abs(frequencies(values, len(probabilities)) - probabilities), 4 * error + 1e-9)


def test_episodes_are_drawn_by_groups_of_age():
  # Ten episodes of different lengths are groups of 2, 2, 2 and 4.
  reference = Reference(1, size=16).play(single(1, 2, 1, 3, 1, 1, 4, 1, 2, 1))
  episode = times(draw(reference.state, 4_000, length=1, beyond_end=False, final_frames=False), 1)[:, 0]
  assert_frequencies(episode, [0.1 / 2] * 6 + [0.7 / 4] * 4)


def test_few_episodes_are_drawn_in_proportion_to_their_steps():
  reference = Reference(1, size=16).play(single(2, 10, -4))
  episode = times(draw(reference.state, 4_000, length=1, beyond_end=False, final_frames=True), 1)[:, 0]
  assert_frequencies(episode, np.array([2, 10, 4]) / 16)


def test_one_group_means_all_episodes_alike():
  reference = Reference(1, size=16).play(single(2, 9, -4))
  keys = jax.random.split(jax.random.key(0), 4_000)
  segments = sample(reference.state, keys, length=1, age_weights=(1.0,), beyond_end=False, final_frames=False)
  assert_frequencies(times(jax.tree.map(np.asarray, segments), 1)[:, 0], [1 / 3] * 3)


@pytest.mark.parametrize("final_frames", [False, True])
def test_the_time_is_uniform_in_the_episode(final_frames):
  reference = Reference(1, size=16).play(single(6))
  time = times(draw(reference.state, 4_000, length=1, beyond_end=False, final_frames=final_frames))[:, 0]
  size = 7 if final_frames else 6
  assert_frequencies(time, [1 / size] * size)


def test_where_the_time_lies_in_the_segment_is_uniform():
  # An episode of 3 steps and a final frame; segments of 2 past its end begin at time - place, in -1 .. 3.
  reference = Reference(1, size=16).play(single(3))
  segments = draw(reference.state, 4_000, length=2, beyond_end=True, final_frames=True)
  first = np.argmax(segments.mask, axis=1)
  begin = times(segments)[np.arange(4_000), first] - first
  # Of the eight pairs (time, place) the ends have one, the others two.
  assert_frequencies(begin + 1, np.array([1, 2, 2, 2, 1]) / 8)


def test_segments_stop_at_the_end_unless_they_may_run_past_it():
  # As above, but a segment is moved back where it would run past the end: last = min(3, time + place).
  reference = Reference(1, size=16).play(single(3))
  segments = draw(reference.state, 4_000, length=2, beyond_end=False, final_frames=True)
  assert segments.mask[:, -1].all()
  # Pairs by time + place: 0 once, 1 twice, 2 twice, 3 twice, and 4, which is moved to 3, once.
  assert_frequencies(times(segments)[:, -1], np.array([1, 2, 2, 3]) / 8)


def test_final_frames_are_real_and_carry_no_step():
  reference = Reference(1, size=16).play(single(3) + single(2, outcome=TRUNCATE))
  segments = draw(reference.state, length=6, beyond_end=True, final_frames=True)
  length = np.where(times(segments, 1) == 0, 3, 2)
  final = segments.mask & (times(segments) == length)
  assert final.any()
  assert not segments.actions[final].any()
  assert not segments.rewards[final].any()
  assert not segments.ends[final].any()
  # The step before ended the first episode, and only cut the second.
  row, column = np.nonzero(final[:, 1:] & segments.mask[:, :-1])
  np.testing.assert_array_equal(segments.ends[row, column], times(segments, 1)[row, column] == 0)


def test_without_final_frames_and_within_the_episode_the_last_frame_can_be_acted_on():
  reference = Reference(1, size=16).play(single(3, 1, 5, 2, -3))
  segments = draw(reference.state, length=4, beyond_end=False, final_frames=False)
  assert segments.mask[:, -1].all()
  assert (segments.actions[segments.mask] > 0).all()


def test_draws_depend_on_the_keys_only():
  reference = Reference(1, size=16).play(single(3, 5, 4, 6))
  settings = {"length": 6, "beyond_end": True, "final_frames": True}
  first, again, other = (draw(reference.state, seed=seed, **settings) for seed in (0, 0, 1))
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  assert (first.observations != other.observations).any()
  # Each segment has a key of its own.
  keys = jax.random.split(jax.random.key(0), 64)[10:20]
  some = sample(reference.state, keys, age_weights=WEIGHTS, **settings)
  np.testing.assert_array_equal(some.observations, first.observations[10:20])


# ---- Chunks ----


def test_padding_of_a_chunk_writes_nothing():
  reference = Reference(3, size=4).play([(GO_ON, END, GO_ON), (END, GO_ON, GO_ON), (GO_ON, GO_ON, TRUNCATE)])
  before = reference.state
  rng = np.random.default_rng(0)
  garbage = replay.Chunk(
    frames=rng.integers(0, 256, (3, 4, *SHAPE), np.uint8),
    actions=rng.integers(1, 5, (3, 4)).astype(np.int32),
    rewards=np.full((3, 4), 9.0, np.float32),
    ends=np.ones((3, 4), bool),
    first=np.ones((3, 4), bool),
    final=rng.random((3, 4)) < 0.5,
    count=np.zeros(3, np.int32),
  )
  after = add(before, garbage)
  for name in ("frames", "actions", "rewards", "ends", "written", "open_episode", "num_episodes"):
    np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
  reference.state = after
  check(reference)


def test_an_empty_chunk_changes_nothing():
  reference = Reference(1, size=16).play(single(3, -2))
  table = reference.table()
  reference.flush()
  assert reference.table() == table
  check(reference)


def test_a_chunk_as_long_as_the_ring_fits_and_a_longer_one_does_not():
  reference = Reference(1, size=8, slots=8).play(single(3, 5, 2, -9, outcome=TRUNCATE))
  check_table(reference)
  writer = replay.ChunkWriter(num_streams=1, size=9, observation_shape=SHAPE)
  with pytest.raises(ValueError, match="9 slots does not fit a ring of 8"):
    replay.add(reference.state, writer.flush())


def test_the_writer_is_full_when_a_step_and_a_final_frame_might_not_fit():
  writer = replay.ChunkWriter(num_streams=2, size=4, observation_shape=SHAPE)
  frames, zeros = np.zeros((2, *SHAPE), np.uint8), np.zeros(2)
  for ends, full in (([True, False], False), ([False, False], True)):
    writer.add(frames, zeros, zeros, np.asarray(ends), np.zeros(2, bool), frames)
    assert writer.is_full == full
  chunk = writer.flush()
  np.testing.assert_array_equal(chunk.count, [3, 2])
  np.testing.assert_array_equal(chunk.first, [[True, False, True, False], [True, False, False, False]])
  np.testing.assert_array_equal(chunk.final, [[False, True, False, False], [False] * 4])
  np.testing.assert_array_equal(writer.flush().count, [0, 0])


def test_the_writer_remembers_who_begins_an_episode():
  starts = np.array([True, False])
  writer = replay.ChunkWriter(num_streams=2, size=4, observation_shape=SHAPE, starts=starts)
  frames, zeros, never = np.zeros((2, *SHAPE), np.uint8), np.zeros(2), np.zeros(2, bool)
  writer.add(frames, zeros, zeros, never, np.array([False, True]), frames)
  np.testing.assert_array_equal(writer.flush().first[:, 0], [True, False])
  np.testing.assert_array_equal(starts, [True, False])  # The caller's array is left alone.
  writer.add(frames, zeros, zeros, never, never, frames)
  np.testing.assert_array_equal(writer.flush().first[:, 0], [False, True])
  with pytest.raises(ValueError, match="room"):
    replay.ChunkWriter(num_streams=1, size=1, observation_shape=SHAPE)


# ---- Recorded episodes ----


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
