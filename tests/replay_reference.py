"""A replay in plain Python, to compare with: scripted episodes, played into lists and into the real one."""

from typing import NamedTuple

import jax
import numpy as np
from hypothesis import strategies as st
from unoptimised import jit

from jedi_jax import replay

SLOTS = 32
SHAPE = (1, 1, 3)  # A frame is its own name: (stream, episode of the stream, time in the episode).
GO_ON, END, TRUNCATE = 0, 1, 2

add = jit(replay.add)
sample = jit(replay.sample, static_argnames=("length", "age_weights", "age_groups", "beyond_end", "final_frames"))
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
