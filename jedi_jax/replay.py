"""Replay on the device: a ring buffer of uint8 frames per stream, a table of episodes, and the sampler of segments.

An episode of n steps takes n + 1 slots of its stream: the frames that actions were taken on, then the true final
frame. Frames of one stream are contiguous, so a segment is a range of slots. A full ring overwrites its oldest frames;
an episode that loses its first frames keeps the others.

The table lists the stored episodes of all streams, oldest first. The cost of adding is proportional to the size of the
chunk and the table; the cost of sampling does not depend on how much is stored.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.episodes import Episode, check_episode
from jedi_jax.errors import UserError
from jedi_jax.types import Array, Segment


class ReplayState(flax.struct.PyTreeNode):
  """S streams of C slots each, and a table of up to E episodes.

  Attributes:
    frames: [S, C, H * W * channels] uint8. Flat, because TPUs gather flat rows in place, while for images they first
      copy the whole ring to another layout.
    actions: [S, C] int32; 0 in the slot of a final frame.
    rewards: [S, C] float32, raw; 0 in the slot of a final frame.
    ends: [S, C] bool; whether the step ended its episode.
    written: [S] int32; number of slots ever written. Slot number i is at ring position i modulo C.
    open_episode: [S] int32; table entry of the stream's unfinished episode, -1 if there is none.
    episode_stream: [E] int32.
    episode_start: [E] int32; slot number of the first stored frame.
    episode_steps: [E] int32; stored steps, the final frame not counted.
    episode_closed: [E] bool; whether the final frame is stored.
    num_episodes: [] int32; number of entries in use, which are the first ones, oldest first.
    observation_shape: (H, W, channels).
  """

  frames: Array
  actions: Array
  rewards: Array
  ends: Array
  written: Array
  open_episode: Array
  episode_stream: Array
  episode_start: Array
  episode_steps: Array
  episode_closed: Array
  num_episodes: Array
  observation_shape: tuple[int, int, int] = flax.struct.field(pytree_node=False)

  def observations(self, stream: Array | int, position: Array | slice) -> Array:
    """Returns the frames at ring positions, [..., H, W, channels]."""
    frames = self.frames[stream, position]
    return frames.reshape(*frames.shape[:-1], *self.observation_shape)


class Chunk(flax.struct.PyTreeNode):
  """K slots to write to each of S streams, of which the first `count` are valid.

  Attributes:
    frames: [S, K, H, W, channels] uint8.
    actions: [S, K] int32.
    rewards: [S, K] float32.
    ends: [S, K] bool.
    first: [S, K] bool; whether the slot begins an episode.
    final: [S, K] bool; whether the slot holds a true final frame, on which no action was taken.
    count: [S] int32.
  """

  frames: Array | np.ndarray
  actions: Array | np.ndarray
  rewards: Array | np.ndarray
  ends: Array | np.ndarray
  first: Array | np.ndarray
  final: Array | np.ndarray
  count: Array | np.ndarray


def init(*, num_streams: int, slots_per_stream: int, observation_shape: tuple[int, int, int]) -> ReplayState:
  """Returns an empty replay with all of its memory allocated.

  Args:
    num_streams: S.
    slots_per_stream: C.
    observation_shape: (H, W, channels).
  """
  ring = (num_streams, slots_per_stream)
  # A closed episode takes at least two slots, and each stream has at most one open episode.
  entries = num_streams * (slots_per_stream // 2 + 2)
  return ReplayState(
    frames=jnp.zeros((*ring, math.prod(observation_shape)), jnp.uint8),
    actions=jnp.zeros(ring, jnp.int32),
    rewards=jnp.zeros(ring, jnp.float32),
    ends=jnp.zeros(ring, bool),
    written=jnp.zeros((num_streams,), jnp.int32),
    open_episode=jnp.full((num_streams,), -1, jnp.int32),
    episode_stream=jnp.zeros((entries,), jnp.int32),
    episode_start=jnp.zeros((entries,), jnp.int32),
    episode_steps=jnp.zeros((entries,), jnp.int32),
    episode_closed=jnp.zeros((entries,), bool),
    num_episodes=jnp.zeros((), jnp.int32),
    observation_shape=observation_shape,
  )


def add(state: ReplayState, chunk: Chunk) -> ReplayState:
  """Appends a chunk to every stream. With `state` donated the ring is written in place.

  Raises:
    ValueError: if the chunk is longer than the ring.
  """
  streams, slots = state.actions.shape
  length = chunk.actions.shape[1]
  chex.assert_shape(chunk.frames, (streams, length, *state.observation_shape))
  chex.assert_type(chunk.frames, jnp.uint8)
  if length > slots:
    raise ValueError(f"a chunk of {length} slots does not fit a ring of {slots}")
  state = _forget(state, state.written + chunk.count - slots)

  # Table entries of the slots. New episodes are numbered by time, then stream. Time counts steps; it differs from the
  # slot, since final frames take slots of their own.
  offsets = jnp.arange(length)
  real = offsets[None] < chunk.count[:, None]
  first, final = chunk.first & real, chunk.final & real
  stream = jnp.broadcast_to(jnp.arange(streams)[:, None], real.shape)
  time = offsets[None] - (jnp.cumsum(final, axis=1) - final)
  begins = jnp.zeros((length, streams), jnp.int32).at[jnp.where(first, time, length), stream].set(1, mode="drop")
  order = jnp.cumsum(begins.reshape(-1)).reshape(length, streams)[time, stream]
  begun = jnp.where(first, state.num_episodes + order - 1, -1)
  entry = jnp.maximum(jax.lax.cummax(begun, axis=1), state.open_episode[:, None])
  nowhere = state.episode_steps.shape[0]
  step = real & ~chunk.final
  number = state.written[:, None] + offsets[None]
  opened = jnp.where(first, entry, nowhere)
  position = jnp.where(real, number % slots, slots)  # Padding is out of range and dropped.

  def write(ring: Array, values: Array | np.ndarray) -> Array:
    return ring.at[stream, position].set(values, mode="drop")

  last = jnp.maximum(chunk.count - 1, 0)
  streams_index = jnp.arange(streams)
  newest = jnp.where(chunk.count > 0, entry[streams_index, last], state.open_episode)
  over = (chunk.count > 0) & chunk.final[streams_index, last]
  return state.replace(
    frames=write(state.frames, chunk.frames.reshape(streams, length, -1)),
    actions=write(state.actions, jnp.where(chunk.final, 0, chunk.actions)),
    rewards=write(state.rewards, jnp.where(chunk.final, 0.0, chunk.rewards)),
    ends=write(state.ends, chunk.ends & ~chunk.final),
    written=state.written + chunk.count,
    open_episode=jnp.where(over, -1, newest),
    episode_stream=state.episode_stream.at[opened].set(stream, mode="drop"),
    episode_start=state.episode_start.at[opened].set(number, mode="drop"),
    episode_steps=state.episode_steps.at[opened]
    .set(0, mode="drop")
    .at[jnp.where(step, entry, nowhere)]
    .add(1, mode="drop"),
    episode_closed=state.episode_closed.at[opened]
    .set(False, mode="drop")
    .at[jnp.where(real & chunk.final, entry, nowhere)]
    .set(True, mode="drop"),
    num_episodes=state.num_episodes + jnp.sum(first),
  )


def _forget(state: ReplayState, oldest: Array) -> ReplayState:
  """Removes frames before slot numbers `oldest` [S] from the table and compacts it."""
  entries = state.episode_steps.shape[0]
  index = jnp.arange(entries)
  used = index < state.num_episodes
  is_open = (
    jnp.zeros((entries,), bool)
    .at[jnp.where(state.open_episode < 0, entries, state.open_episode)]
    .set(True, mode="drop")
  )
  start = jnp.maximum(state.episode_start, oldest[state.episode_stream])
  steps = jnp.maximum(state.episode_steps - (start - state.episode_start), 0)
  keep = used & ((steps > 0) | is_open)
  target = jnp.where(keep, jnp.cumsum(keep) - 1, entries)

  def compact(values: Array) -> Array:
    return jnp.zeros_like(values).at[target].set(values, mode="drop")

  return state.replace(
    open_episode=jnp.where(state.open_episode < 0, -1, target[state.open_episode]),
    episode_stream=compact(state.episode_stream),
    episode_start=compact(start),
    episode_steps=compact(steps),
    episode_closed=compact(state.episode_closed),
    num_episodes=jnp.sum(keep).astype(jnp.int32),
  )


def sample(
  state: ReplayState,
  keys: Array,
  *,
  length: int,
  age_weights: tuple[float, ...],
  age_groups: str = "episodes",
  beyond_end: bool,
  final_frames: bool,
) -> Segment:
  """Draws one segment per key.

  Draws an episode, then a time in it, then the position of that time in the segment; the latter two are uniform.
  Segments may begin before their episode.

  Args:
    state: a replay with at least one step.
    keys: [B] random keys, consumed.
    length: T, frames per segment.
    age_weights: probabilities of the groups, oldest first.
    age_groups: 'episodes' for groups of equally many episodes, of which the last takes the remainder; while there are
      fewer episodes than groups, an episode's probability is proportional to its steps. 'steps' for groups of equally
      many steps; within a group an episode's probability is proportional to its steps.
    beyond_end: whether segments may extend past the end of their episode.
    final_frames: whether the drawn time may be that of the true final frame.

  Returns:
    `Segment` of shapes [B, T, ...]. Frames outside the episode are masked; a final frame is not.
  """
  slots = state.actions.shape[1]
  groups = len(age_weights)

  def draw(key: Array) -> tuple[Array, ...]:
    group_key, member_key, time_key, place_key = jax.random.split(key, 4)
    if age_groups == "steps":
      episode = _draw_by_steps(state, group_key, member_key, age_weights)
    else:
      episode = _draw_episode(state, group_key, member_key, age_weights, groups)
    steps = state.episode_steps[episode]
    stored = steps + state.episode_closed[episode]  # Frames, including the final one.
    drawable = stored if final_frames else steps
    time = jax.random.randint(time_key, (), 0, drawable)
    place = jax.random.randint(place_key, (), 0, length)
    begin = time - place if beyond_end else jnp.minimum(drawable, time + 1 + place) - length
    index = begin + jnp.arange(length)
    mask = (index >= 0) & (index < stored)
    position = (state.episode_start[episode] + jnp.clip(index, 0, stored - 1)) % slots
    return jnp.broadcast_to(state.episode_stream[episode], index.shape), position, mask

  stream, position, mask = jax.vmap(draw)(keys)
  return Segment(
    observations=state.observations(stream, position),
    actions=jnp.where(mask, state.actions[stream, position], 0),
    rewards=jnp.where(mask, state.rewards[stream, position], 0.0),
    ends=state.ends[stream, position] & mask,
    mask=mask,
  )


def _draw_episode(
  state: ReplayState, group_key: Array, member_key: Array, age_weights: tuple[float, ...], groups: int
) -> Array:
  """Draws the table entry of an episode; see `sample`."""
  count = state.num_episodes
  size = count // groups
  group = jax.random.choice(group_key, groups, p=jnp.asarray(age_weights))
  members = jnp.maximum(size + jnp.where(group == groups - 1, count % groups, 0), 1)
  by_age = group * size + jax.random.randint(member_key, (), 0, members)
  if groups == 1:
    return by_age
  first = state.episode_steps[: groups - 1]
  few = jnp.where(jnp.arange(first.shape[0]) < count, first, 0)
  by_steps = jax.random.categorical(group_key, jnp.log(few))
  return jnp.where(count < groups, by_steps, by_age)


def _draw_by_steps(state: ReplayState, group_key: Array, member_key: Array, age_weights: tuple[float, ...]) -> Array:
  """Draws the table entry of an episode in groups of equally many steps; see `sample`."""
  used = jnp.arange(state.episode_steps.shape[0]) < state.num_episodes
  ends = jnp.cumsum(jnp.where(used, state.episode_steps, 0))
  group = jax.random.choice(group_key, len(age_weights), p=jnp.asarray(age_weights))
  share = (group + jax.random.uniform(member_key)) / len(age_weights)
  step = jnp.minimum((share * ends[-1]).astype(jnp.int32), ends[-1] - 1)
  return jnp.searchsorted(ends, step, side="right").astype(jnp.int32)


class ChunkWriter:
  """Packs the steps of S environments into chunks of fixed size, on the host.

  Args:
    num_streams: S.
    size: K, slots of a chunk, at least 2.
    observation_shape: (H, W, channels).
    starts: [S] bool; whether the next step of each stream begins an episode. All do if None.

  Attributes:
    starts: as above.
  """

  def __init__(
    self,
    *,
    num_streams: int,
    size: int,
    observation_shape: tuple[int, int, int],
    starts: np.ndarray | None = None,
  ):
    if size < 2:
      raise ValueError(f"a chunk of {size} slots has no room for a step and a final frame: use at least 2")
    self._size = size
    self._shape = (num_streams, size)
    self._observation_shape = observation_shape
    self.starts = np.ones(num_streams, bool) if starts is None else starts.copy()
    self._chunk = self._empty()

  def _empty(self) -> Chunk:
    return Chunk(
      frames=np.zeros((*self._shape, *self._observation_shape), np.uint8),
      actions=np.zeros(self._shape, np.int32),
      rewards=np.zeros(self._shape, np.float32),
      ends=np.zeros(self._shape, bool),
      first=np.zeros(self._shape, bool),
      final=np.zeros(self._shape, bool),
      count=np.zeros(self._shape[:1], np.int32),
    )

  @property
  def is_full(self) -> bool:
    """Whether the next step may not fit, so that `flush` must be called."""
    return bool(np.max(self._chunk.count) > self._size - 2)

  def add(
    self,
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    ends: np.ndarray,
    truncated: np.ndarray,
    next_observations: np.ndarray,
  ) -> None:
    """Adds one step of every environment, and the final frames of episodes that it finishes.

    Args:
      observations: [S, H, W, channels] uint8, on which the actions were taken.
      actions: [S] integers.
      rewards: [S] float32, raw.
      ends: [S] bool; whether the episode terminated with this step.
      truncated: [S] bool; whether the episode was truncated after this step.
      next_observations: [S, H, W, channels] uint8, after the step.
    """
    chunk, streams, at = self._chunk, np.arange(self._shape[0]), self._chunk.count
    chunk.frames[streams, at] = observations
    chunk.actions[streams, at] = actions
    chunk.rewards[streams, at] = rewards
    chunk.ends[streams, at] = ends
    chunk.first[streams, at] = self.starts
    self.starts = ends | truncated
    at += 1
    over = np.flatnonzero(self.starts)
    chunk.frames[over, at[over]] = next_observations[over]
    chunk.final[over, at[over]] = True
    at[over] += 1

  def flush(self) -> Chunk:
    """Returns the steps since the last flush and begins a new chunk."""
    chunk, self._chunk = self._chunk, self._empty()
    return chunk


def from_episodes(episodes: Iterable[Any], *, capacity: int | None = None) -> ReplayState:
  """Returns a replay of one stream with recorded episodes.

  Args:
    episodes: `Episode`s, or mappings or other named tuples with its fields; oldest first.
    capacity: slots of the ring; an episode of T steps takes T + 1. If the episodes take more, the oldest frames are
      dropped. If None, the ring is as large as the episodes.

  Raises:
    UserError: if there are no episodes or one has wrong shapes or dtypes.
  """
  checked = [check_episode(f"episode {index}", episode) for index, episode in enumerate(episodes)]
  if not checked:
    raise UserError("there are no episodes: give at least one")
  if capacity is not None and capacity < 2:
    raise UserError(f"capacity={capacity} has no room for a step and a final frame: give at least 2")
  shape = checked[0].observations.shape[1:]
  for index, episode in enumerate(checked):
    if episode.observations.shape[1:] != shape:
      raise UserError(
        f"episode {index} has frames of shape {episode.observations.shape[1:]} and episode 0 of {shape}: resize them"
      )
  slots = capacity or sum(len(episode.observations) for episode in checked)
  state = init(num_streams=1, slots_per_stream=slots, observation_shape=shape)
  append = jax.jit(add, donate_argnums=0)
  for chunk in chunks(checked, size=min(slots, _CHUNK_SLOTS)):
    state = append(state, chunk)
  return state


_CHUNK_SLOTS = 1024


def chunks(episodes: Sequence[Episode], *, size: int) -> Iterator[Chunk]:
  """Yields the steps of recorded episodes as chunks of one stream, in order.

  Args:
    episodes: at least one, as `check_episode` returns them, with frames of one shape.
    size: slots of a chunk, at least 2.
  """
  writer = ChunkWriter(num_streams=1, size=size, observation_shape=episodes[0].observations.shape[1:])
  for frames, actions, rewards, ends in episodes:
    for t, action in enumerate(actions):
      last = np.asarray([t == len(actions) - 1], bool)
      writer.add(frames[t], action, rewards[t], last & ends, last & np.logical_not(ends), frames[t + 1][None])
      if writer.is_full:
        yield writer.flush()
  yield writer.flush()


def to_episodes(state: Any) -> Iterator[Episode]:
  """Yields the stored episodes, oldest first.

  The last step of an episode whose final frame is not stored is dropped, since the frame after it is not recorded.

  Args:
    state: a `ReplayState` of NumPy arrays.
  """
  slots = state.actions.shape[1]
  for entry in range(int(state.num_episodes)):
    steps = int(state.episode_steps[entry]) - (not state.episode_closed[entry])
    if steps < 1:
      continue
    stream, start = int(state.episode_stream[entry]), int(state.episode_start[entry])
    at = (start + np.arange(steps + 1)) % slots
    acted = at[:-1]
    ends = bool(state.ends[stream, acted[-1]])
    yield Episode(state.observations(stream, at), state.actions[stream, acted], state.rewards[stream, acted], ends)
