"""Replay on the device: a ring of uint8 frames a stream, a table of episodes, and the sampler of segments.

An episode of n steps takes n + 1 slots of its stream: the frames that actions were taken on, then the true final
frame. Frames of one stream follow one another without gaps, so a segment is a run of slots. When the ring is full the
oldest frames go, and an episode that loses its head stays with what is left of it.

The table lists the surviving episodes of all streams in order of age. Adding costs time in proportion to the chunk and
the table; sampling looks at single entries of the table and costs the same however much is stored.
"""

import math

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.types import Array, Segment


class ReplayState(flax.struct.PyTreeNode):
  """S streams of C slots each, and a table of up to E episodes.

  Attributes:
    frames: [S, C, H * W * channels] uint8. Flat, because TPUs gather rows of one dimension where they lie; of images
      they first copy the whole ring to another layout.
    actions: [S, C] int32; 0 in the slot of a final frame.
    rewards: [S, C] float32, raw; 0 in the slot of a final frame.
    ends: [S, C] bool; the step ended its episode.
    written: [S] int32; slots ever written. The ring position of slot number i is i modulo C.
    open_episode: [S] int32; the table's entry that the stream is writing to, -1 for none.
    episode_stream: [E] int32.
    episode_start: [E] int32; slot number of the first surviving frame.
    episode_steps: [E] int32; surviving steps (the final frame is not one).
    episode_closed: [E] bool; whether the final frame is stored.
    num_episodes: [] int32; entries in use, oldest first.
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
  """K slots to write to each of S streams, of which the first `count` are real.

  Attributes:
    frames: [S, K, H, W, channels] uint8.
    actions: [S, K] int32.
    rewards: [S, K] float32.
    ends: [S, K] bool.
    first: [S, K] bool; the slot begins an episode.
    final: [S, K] bool; the slot holds a true final frame, on which no action was taken.
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
  """Makes an empty replay, all of its memory allocated.

  Args:
    num_streams: S.
    slots_per_stream: C.
    observation_shape: (H, W, channels).
  """
  ring = (num_streams, slots_per_stream)
  # A closed episode takes two slots at least, and a stream has one open episode.
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
  """Appends a chunk to every stream. Donate `state`: the ring is then written in place.

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

  # Entries of the table that the slots belong to. Episodes that begin are numbered in order of time, then stream; time
  # counts steps, not slots, of which final frames take extra ones.
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
  position = jnp.where(real, number % slots, slots)  # Padding falls outside and is dropped.

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
  """Drops from the table what lies before slot numbers `oldest` [S], and closes the gaps."""
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
  beyond_end: bool,
  final_frames: bool,
) -> Segment:
  """Draws one segment for each key.

  An episode is drawn, then uniformly a time in it, then uniformly where in the segment that time lies. Segments may
  begin before their episode.

  Args:
    state: a replay with at least one step.
    keys: [B] random keys, consumed.
    length: T, frames of a segment.
    age_weights: probabilities of equal groups of episodes, oldest first (the last group takes the remainder). While
      there are fewer episodes than groups, episodes are drawn in proportion to their steps.
    beyond_end: whether segments may run past the end of their episode; otherwise they stop at it.
    final_frames: whether the time drawn may be the true final frame's.

  Returns:
    `Segment` of shapes [B, T, ...]; what lies outside the episode is masked. A final frame inside is real.
  """
  slots = state.actions.shape[1]
  groups = len(age_weights)

  def draw(key: Array) -> tuple[Array, ...]:
    group_key, member_key, time_key, place_key = jax.random.split(key, 4)
    episode = _draw_episode(state, group_key, member_key, age_weights, groups)
    steps = state.episode_steps[episode]
    stored = steps + state.episode_closed[episode]  # Frames, the final one included.
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
  """Returns the index of one episode; see `sample`."""
  count = state.num_episodes
  size = count // groups
  group = jax.random.choice(group_key, groups, p=jnp.asarray(age_weights))
  members = jnp.maximum(size + jnp.where(group == groups - 1, count % groups, 0), 1)
  by_age = group * size + jax.random.randint(member_key, (), 0, members)
  if groups == 1:
    return by_age
  few = jnp.where(jnp.arange(groups - 1) < count, state.episode_steps[: groups - 1], 0)
  by_steps = jax.random.categorical(group_key, jnp.log(few))
  return jnp.where(count < groups, by_steps, by_age)


class ChunkWriter:
  """Packs the steps of S environments into chunks of fixed size, on the host.

  Args:
    num_streams: S.
    size: K, slots of a chunk.
    observation_shape: (H, W, channels).
    starts: [S] bool; which streams begin an episode with their next step (all, at first).
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
      raise ValueError("a chunk needs room for a step and a final frame")
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
    """Whether the next step might not fit, so that `flush` is due."""
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
    """Adds one step of every environment; where an episode is over, its final frame as well.

    Args:
      observations: [S, H, W, channels] uint8, what the actions were chosen on.
      actions: [S] integers.
      rewards: [S] float32, raw.
      ends: [S] bool.
      truncated: [S] bool.
      next_observations: [S, H, W, channels] uint8, what the actions led to.
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
    """Returns what was added since the last flush, and starts a new chunk."""
    chunk, self._chunk = self._chunk, self._empty()
    return chunk
