import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from replay_reference import (
  END,
  GO_ON,
  SHAPE,
  SLOTS,
  TRUNCATE,
  WEIGHTS,
  Reference,
  add,
  check,
  check_table,
  draw,
  sample,
  scripts,
  single,
  times,
)

from jedi_jax import replay

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


def test_there_may_be_more_groups_than_the_table_has_entries():
  state = replay.from_episodes([replay.Episode(np.zeros((3, *SHAPE), np.uint8), np.zeros(2, int), np.zeros(2), True)])
  assert state.episode_steps.shape[0] < 4
  keys = jax.random.split(jax.random.key(0), 8)
  drawn = sample(state, keys, length=1, age_weights=(0.2,) * 5, beyond_end=False, final_frames=False)
  assert drawn.mask.all()


def test_one_group_means_all_episodes_alike():
  reference = Reference(1, size=16).play(single(2, 9, -4))
  keys = jax.random.split(jax.random.key(0), 4_000)
  segments = sample(reference.state, keys, length=1, age_weights=(1.0,), beyond_end=False, final_frames=False)
  assert_frequencies(times(jax.tree.map(np.asarray, segments), 1)[:, 0], [1 / 3] * 3)


def test_groups_of_age_can_have_equal_numbers_of_steps():
  # Twelve steps: the groups are steps 0 to 5 and 6 to 11. The episode of 8 steps has 4 in the older one.
  reference = Reference(1, size=16).play(single(2, 8, -2))
  keys = jax.random.split(jax.random.key(0), 4_000)
  segments = sample(
    reference.state, keys, length=1, age_weights=(0.25, 0.75), age_groups="steps", beyond_end=False, final_frames=False
  )
  episode = times(jax.tree.map(np.asarray, segments), 1)[:, 0]
  assert_frequencies(episode, [0.25 * 2 / 6, 0.25 * 4 / 6 + 0.75 * 4 / 6, 0.75 * 2 / 6])


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
