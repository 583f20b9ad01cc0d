"""A session of play: the dream beside the real game, what the player has set, the curves, and the recording.

A session knows nothing of servers. Its methods are called by one thread at a time.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
import struct
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jedi_jax.agent import Agent
from jedi_jax.errors import UserError, nearest
from jedi_jax.inspection import film
from jedi_jax.ops.images import to_rgb
from jedi_jax.play import controls
from jedi_jax.play.worlds import Dream, Game, Moment, draw
from jedi_jax.types import Segment

HISTORY = 300
"""Steps of the curves."""
MAX_FRAMES = 1_000
"""Frames of a recording, which then ends."""
MAX_MESSAGE = 512
"""Largest length of a message in bytes."""
MAX_LEAD = 1_000
MAX_SAMPLER_STEPS = 50
SPEEDS = (0.5, 60.0)


class Session:
  """The dream of an agent that a player acts in.

  Args:
    agent: an agent with its configuration, a decoder and all parameters.
    seed: seed of games, dreams and the policy's actions.
    speed: steps a second; None for the usual speed of the environment.
    starts: [R, L, ...] real frames to start dreams from, in turn; None to play the real game beside the dream and to
      start from its frames.

  Raises:
    UserError: if the agent lacks one of them, the environment cannot be made, or an argument is out of its range.
  """

  def __init__(self, agent: Agent, *, seed: int = 0, speed: float | None = None, starts: Segment | None = None):
    self._dream = Dream(agent, seed=seed)
    assert agent.config is not None  # The dream has checked it.
    self._name = agent.config.env.name
    actions = int(agent.model.num_actions(agent.params))
    self._actions = controls.action_names(self._name, actions)
    self._trained_steps = self._dream.sampler_steps
    self._random = np.random.default_rng(seed)
    self._game = Game(agent, seed=seed) if starts is None else None
    self._starts, self._next = starts, 0
    self._settings: dict[str, Any] = {
      "paused": True,
      "policy": False,
      "again": True,
      "speed": controls.usual_speed(self._name) if speed is None else speed,
      "lead": 0,
      "sampler_steps": self._trained_steps,
    }
    self._check("speed", self._settings["speed"])
    self._held = self._idle = self._actions.index("noop") if "noop" in self._actions else 0
    self._history: collections.deque[dict[str, Any]] = collections.deque(maxlen=HISTORY)
    self._times: collections.deque[float] = collections.deque(maxlen=30)
    self._takes: list[list[tuple[Moment, Moment | None]]] | None = None
    self._wait, self._count = 0.0, 0
    self._dreamed: Moment
    self._real: Moment | None
    self._action: int
    self._start_dream(self._game.reset() if self._game is not None else None)
    self._dream.compile()

  @property
  def paused(self) -> bool:
    """Whether time stands still until the player goes on."""
    return self._settings["paused"]

  @property
  def interval(self) -> float:
    """Seconds between steps; short in a pause, so that its end is noticed."""
    return 0.05 if self._settings["paused"] else 1.0 / self._settings["speed"]

  def release(self) -> None:
    """Releases the held action, as its player has left."""
    self._held = self._idle

  def close(self) -> None:
    """Closes the real game."""
    if self._game is not None:
      self._game.close()

  # What the page is sent.

  def description(self) -> dict[str, Any]:
    """Returns what does not change while the program runs, the settings, and the curves so far."""
    height, width = self._dreamed.frame.shape[:2]
    return {
      **self.state(),
      "type": "hello",
      "env": self._name,
      "actions": self._actions,
      "idle": self._idle,
      "height": height,
      "width": width,
      "real": self._game is not None,
      "trained_sampler_steps": self._trained_steps,
      "max_sampler_steps": MAX_SAMPLER_STEPS,
      "max_lead": MAX_LEAD,
      "history_length": HISTORY,
      "history": list(self._history),
    }

  def state(self) -> dict[str, Any]:
    """Returns the settings and the number of recorded frames, None if nothing is recorded."""
    frames = None if self._takes is None else sum(map(len, self._takes))
    return {"type": "state", "settings": dict(self._settings), "recorded": frames}

  def picture(self) -> bytes:
    """Returns the frames on the screen: uint32 length of a JSON header, the header, RGB bytes [H, W, 3] of each."""
    gaps = np.diff(self._times)
    header = {
      **self._history[-1],
      "action": self._action,
      "probabilities": [_number(p) for p in self._dreamed.probabilities[: len(self._actions)]],
      "dream_over": self._dreamed.over,
      "real_over": self._real is not None and self._real.over,
      "rate": _number(1.0 / gaps.mean()) if len(gaps) and gaps.mean() > 0 else None,
      "recorded": None if self._takes is None else sum(map(len, self._takes)),
    }
    text = json.dumps(header).encode()
    frames = [to_rgb(moment.frame).tobytes() for moment in (self._dreamed, self._real) if moment is not None]
    return b"".join((struct.pack("<I", len(text)), text, *frames))

  # What the page sends.

  def handle(self, text: str) -> Callable[[], dict[str, Any] | bytes] | None:
    """Carries out a message of the page, or returns a function that does so where this takes long.

    Args:
      text: a JSON object; `do` names what to do, and the other fields are its arguments.

    Raises:
      UserError: if the message is malformed; nothing has changed then.
    """
    message = _parse(text)
    do = message.pop("do", None)
    known: dict[Any, tuple[str, ...]] = {
      "hold": ("action",),
      "step": ("action",),
      "set": tuple(self._settings),
      "new": (),
      "from_here": (),
      "record": ("on",),
    }
    if not isinstance(do, str) or do not in known:
      raise UserError(f"unknown message {str(do)[:20]!r}{nearest(str(do), known)}")
    for name, value in message.items():
      if name not in known[do]:
        raise UserError(f"message {do!r} has no field {name[:20]!r}{nearest(name, known[do])}")
      self._check(name, value)
    if do != "set" and (missing := set(known[do]) - set(message)):
      raise UserError(f"message {do!r} lacks the field {missing.pop()!r}")
    if do == "hold":
      self._held = message["action"]
    elif do == "set":
      return self._set(message)
    elif do == "step":
      self._settings["paused"] = True
      self.step(message["action"])
    elif do == "new":
      self._start_dream(self._game.reset(self._settings["lead"]) if self._game is not None else None)
    elif do == "from_here":
      self._resume()
    elif message["on"]:
      self._takes = [[(self._dreamed, self._real)]]
    elif self._takes is not None:
      takes, self._takes = self._takes, None
      return lambda: self._write(takes)
    return None

  def _check(self, name: str, value: Any) -> None:
    """Raises `UserError` for a value of a wrong type or out of its range."""
    ranges = {
      "action": (0, len(self._actions) - 1),
      "speed": SPEEDS,
      "lead": (0, MAX_LEAD),
      "sampler_steps": (1, MAX_SAMPLER_STEPS) if self._trained_steps else (0, 0),
    }
    if name not in ranges:
      if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false")
      return
    low, high = ranges[name]
    kinds = (int, float) if name == "speed" else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
      raise UserError(f"{name} must be a number from {low} to {high}")

  def _set(self, values: dict[str, Any]) -> Callable[[], dict[str, Any] | bytes] | None:
    steps = values.get("sampler_steps", self._dream.sampler_steps)
    if values.get("paused", True) is False:
      self._times.clear()
    if steps == self._dream.sampler_steps:
      self._settings |= values
      return None

    def compile_sampler() -> dict[str, Any]:
      self._dream.sampler_steps = steps
      self._dream.compile()
      self._settings.update(values)
      self._times.clear()
      return self.state()

    return compile_sampler

  # Time.

  def tick(self) -> bool:
    """Takes a step unless the session is paused or waits after an end; returns whether there is a new picture."""
    if self._settings["paused"]:
      return False
    if self._dreamed.over:
      if not self._settings["again"]:
        self._settings["paused"] = True
        return True
      if time.monotonic() < self._wait:
        return False
      self._resume()
      return True
    self.step(self.choose())
    return True

  def step(self, action: int) -> None:
    """Takes an action in the dream and in the real game; a dream that is over starts again instead."""
    if self._dreamed.over:
      self._resume()
      return
    self._action = action
    self._dreamed = self._dream.step(action)
    stands = self._real is None or self._real.over
    if self._game is not None and not stands:
      self._real = self._game.step(action)
    if self._dreamed.over:
      self._wait = time.monotonic() + 1.0
    self._times.append(time.monotonic())
    self._note(stands=stands)

  def choose(self) -> int:
    """Returns the action of the policy or of the player, whoever plays."""
    if self._settings["policy"]:
      return draw(self._random, self._dreamed.probabilities[: len(self._actions)])
    return self._held

  def _resume(self) -> None:
    """Starts the dream again from the frame of the real game, which begins again if it is over."""
    real = self._real
    if self._game is not None and real is not None and real.over:
      real = self._game.resume()
    self._start_dream(real)

  def _start_dream(self, real: Moment | None) -> None:
    if self._game is not None:
      start = self._game.start()
    else:
      assert self._starts is not None
      row = self._next % len(self._starts.mask)
      start, self._next = jax.tree.map(lambda x: x[row : row + 1], self._starts), self._next + 1
    self._real, self._dreamed, self._action = real, self._dream.reset(start), self._idle
    self._times.clear()  # A wait after an end is no slowness.
    if self._takes is not None:
      self._takes.append([])
    self._note(start=True)

  def _note(self, *, start: bool = False, stands: bool = False) -> None:
    """Adds the step on the screen to the curves, without a real game that stands still, and to the recording."""
    row: dict[str, Any] = {"count": self._count, "start": start}
    self._count += 1
    moments: tuple[tuple[str, Moment | None], ...] = (
      ("dream", self._dreamed),
      ("real", None if stands else self._real),
    )
    for name, moment in moments:
      row[name] = None if moment is None else [_number(x) for x in (moment.reward, moment.end, moment.value)]
    self._history.append(row)
    if self._takes is not None and sum(map(len, self._takes)) < MAX_FRAMES:
      self._takes[-1].append((self._dreamed, self._real))

  def _write(self, takes: list[list[tuple[Moment, Moment | None]]]) -> bytes:
    """Returns a GIF of a recording."""
    images = []
    for take in filter(None, takes):
      panes = [[pair[i] for pair in take] for i in range(1 if take[0][1] is None else 2)]
      images += film.draw(_film(panes), names=("dream", "real game")[: len(panes)])
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "dream.gif"
      film.write(images, path, frames_per_second=min(self._settings["speed"], 50.0))
      return path.read_bytes()


def _film(panes: list[list[Any]]) -> film.Film:
  """Makes a film of one segment of the moments of each pane; it ends where an episode is over."""

  def stack(read: Callable[[Moment], Any]) -> np.ndarray:
    return np.stack([np.stack([np.asarray(read(moment)) for moment in pane])[None] for pane in panes])

  def numbers(read: Callable[[Moment], float]) -> np.ndarray:
    return np.nan_to_num(stack(read).astype(np.float32))

  over = stack(lambda moment: moment.over).astype(int)
  return film.Film(
    frames=stack(lambda moment: moment.frame),
    rewards=numbers(lambda moment: moment.reward),
    ends=numbers(lambda moment: moment.end),
    values=numbers(lambda moment: moment.value),
    shown=np.cumsum(over, axis=2) - over == 0,  # A pane that is over repeats its last moment.
  )


def _parse(text: str) -> dict[str, Any]:
  """Reads a JSON object of a page."""
  if len(text.encode()) > MAX_MESSAGE:
    raise UserError(f"a message has more than {MAX_MESSAGE} bytes")
  try:
    message = json.loads(text)
  except (ValueError, RecursionError):
    raise UserError("a message is not JSON") from None
  if not isinstance(message, dict):
    raise UserError("a message is not a JSON object")
  return message


def _number(x: float) -> float | None:
  """Returns a number that JSON has, rounded; None if it is not finite."""
  return round(float(x), 4) if math.isfinite(x) else None
