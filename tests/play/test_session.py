import io
import json
import struct

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from jedi_jax import envs
from jedi_jax.inspection import recording
from jedi_jax.play import controls
from jedi_jax.play.session import HISTORY, MAX_FRAMES, MAX_MESSAGE, Session


def send(session, **message):
  return session.handle(json.dumps(message))


def read(session):
  """The header and the frames of a picture."""
  data = session.picture()
  (length,) = struct.unpack("<I", data[:4])
  return json.loads(data[4 : 4 + length]), np.frombuffer(data[4 + length :], np.uint8).reshape(-1, 24, 24, 3)


def test_a_session_begins_paused_with_the_frame_of_a_new_game(session):
  about = session.description()
  assert about["env"] == "catch"
  assert about["actions"] == ("left", "noop", "right")
  assert about["settings"]["paused"]
  assert not session.tick()
  header, (dream, real) = read(session)
  np.testing.assert_array_equal(dream, real)
  assert header["start"]
  assert json.loads(json.dumps(about))["history"] == [{k: header[k] for k in ("count", "start", "dream", "real")}]


def test_the_held_action_is_taken_until_it_is_released(session):
  send(session, do="set", paused=False)
  send(session, do="hold", action=0)
  assert session.tick()
  assert read(session)[0]["action"] == 0
  session.release()
  assert session.tick()
  assert read(session)[0]["action"] == 1


def test_one_step_is_taken_and_time_stands_still(session):
  send(session, do="set", paused=False)
  before = read(session)[1]
  send(session, do="step", action=0)
  after = read(session)[1]
  assert session.paused
  assert not session.tick()
  assert np.any(before[1] != after[1])
  assert np.any(before[0] != after[0])
  assert len(session.description()["history"]) == 2


def test_a_dream_that_is_over_starts_again_from_the_frame_of_the_game(session):
  send(session, do="set", paused=False)
  send(session, do="hold", action=2)
  session.tick()
  assert read(session)[0]["dream_over"]
  assert not session.tick()  # It waits.
  send(session, do="step", action=1)
  header, (dream, real) = read(session)
  assert header["start"]
  np.testing.assert_array_equal(dream, real)
  assert not header["real_over"]


def test_without_again_an_end_pauses(session):
  send(session, do="set", paused=False, again=False)
  send(session, do="hold", action=2)
  assert session.tick()
  assert not session.paused
  assert session.tick()
  assert session.paused


def test_the_dream_goes_on_after_the_end_of_the_game(session):
  for _ in range(11):
    send(session, do="step", action=1)
  header, _ = read(session)
  assert header["real_over"]
  assert header["real"] is None  # Its curve has ended.
  assert not header["dream_over"]
  send(session, do="from_here")
  header, (dream, real) = read(session)
  assert not header["real_over"]
  np.testing.assert_array_equal(dream, real)


def test_a_new_game_starts_after_steps_of_the_policy(session):
  send(session, do="set", lead=5)
  send(session, do="new")
  first = read(session)[1][1]
  assert first[2 + 2 * 5, 2:-2].max() == 255  # The ball has fallen five rows.


def test_the_policy_plays(session):
  send(session, do="set", policy=True, paused=False)
  taken = set()
  for _ in range(30):
    session.step(session.choose())
    taken.add(read(session)[0]["action"])
  assert len(taken) > 1


def test_sampler_steps_are_compiled_by_the_returned_function(session):
  work = send(session, do="set", sampler_steps=4)
  assert session.state()["settings"]["sampler_steps"] == 2
  assert work()["settings"]["sampler_steps"] == 4
  send(session, do="step", action=0)
  assert session.state()["settings"]["sampler_steps"] == 4


def test_a_recording_is_a_gif(session):
  send(session, do="record", on=True)
  for action in (0, 1, 2, 1, 0):
    send(session, do="step", action=action)
  assert session.state()["recorded"] == 6
  data = send(session, do="record", on=False)()
  with Image.open(io.BytesIO(data)) as image:
    assert image.format == "GIF"
    assert 3 <= image.n_frames <= 6
    assert image.width > 2 * 192
  assert session.state()["recorded"] is None
  assert send(session, do="record", on=False) is None


def test_curves_and_recordings_are_bounded(session):
  send(session, do="record", on=True)
  session._takes[-1] *= MAX_FRAMES
  session._history.extend(session._history[-1] for _ in range(2 * HISTORY))
  send(session, do="step", action=0)
  assert session.state()["recorded"] == MAX_FRAMES
  assert len(session.description()["history"]) == HISTORY


def test_numbers_that_are_not_finite_are_null(session):
  session._dreamed = session._dreamed._replace(value=float("nan"))
  session._note()
  header, _ = read(session)
  assert header["dream"][2] is None


def test_dreams_start_from_given_frames_without_a_game(agent):
  episodes = recording.record(agent, steps=20, num_envs=1, seed=5)
  starts = recording.windows(episodes, before=2, after=0, stride=5)
  session = Session(agent, starts=starts)
  seen = []
  for _ in range(3):
    header, frames = read(session)
    assert header["real"] is None
    seen.append(frames[0])
    send(session, do="new")
  np.testing.assert_array_equal(seen, starts.observations[:3, -1])
  send(session, do="record", on=True)
  send(session, do="step", action=1)
  assert send(session, do="record", on=False)()[:3] == b"GIF"


MALFORMED = {
  "no JSON": ("{", ["not JSON"]),
  "no object": ("[1]", ["object"]),
  "nothing to do": ("{}", ["unknown message"]),
  "unknown": ('{"do": "stp", "action": 1}', ["stp", "step"]),
  "unhashable": ('{"do": ["step"]}', ["unknown message"]),
  "unknown field": ('{"do": "set", "sped": 1}', ["sped", "speed"]),
  "missing field": ('{"do": "step"}', ["action"]),
  "action too large": ('{"do": "hold", "action": 3}', ["action", "0 to 2"]),
  "action as text": ('{"do": "hold", "action": "1"}', ["action"]),
  "action as truth": ('{"do": "hold", "action": true}', ["action"]),
  "a fraction": ('{"do": "hold", "action": 0.5}', ["action"]),
  "speed not a number": ('{"do": "set", "speed": NaN}', ["speed"]),
  "speed infinite": ('{"do": "set", "speed": 1e999}', ["speed"]),
  "no sampler steps": ('{"do": "set", "paused": false, "sampler_steps": 0}', ["sampler_steps", "1"]),
  "a number for a switch": ('{"do": "set", "paused": 0}', ["paused"]),
  "deep": ("[" * MAX_MESSAGE, ["JSON"]),
  "long": (" " * (MAX_MESSAGE + 1), ["bytes"]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_message_changes_nothing(session, name):
  before = session.description(), session.picture()
  text, parts = MALFORMED[name]
  refused(lambda: session.handle(text), *parts)
  assert (session.description(), session.picture()) == before


def test_a_speed_out_of_range_is_refused(agent):
  refused(lambda: Session(agent, speed=1000.0), "speed", "60")


def test_names_of_actions_fit_their_environments():
  assert controls.action_names("atari/Breakout?skip=2-6", 4) == ("noop", "fire", "right", "left")
  assert controls.action_names("minatar/Breakout?sticky=0.1", 3) == ("noop", "left", "right")
  assert controls.action_names("my/game", 2) == ("action 0", "action 1")
  for name in ("atari/Breakout", "atari/Pong", "atari/KungFuMaster", "atari/Amidar", "atari/Alien", "atari/Freeway"):
    names = controls.action_names(name, envs.spec(name).num_actions)
    assert names[0] == "noop", name
    assert len(set(names)) == len(names)
