import numpy as np
import pytest

from jedi_jax import envs
from jedi_jax.errors import UserError, nearest
from jedi_jax.evaluation import human_normalized_score

# Sizes of the minimal action sets, from the Arcade Learning Environment's own tables.
MINIMAL_ACTIONS = {"Breakout": 4, "Pong": 6, "Freeway": 3, "MsPacman": 9, "Seaquest": 18}


def test_names_are_catch_and_the_families():
  known = envs.names()
  assert known[0] == "catch"
  families = [name.partition("/")[0] for name in known[1:]]
  assert list(dict.fromkeys(families)) == ["atari", "procgen", "vizdoom", "minigrid", "minatar"]
  assert families == sorted(families, key=list(dict.fromkeys(families)).index)
  assert len(set(known)) == len(known)
  assert "atari/Ant" not in known  # MuJoCo, though its version is v5 as well.
  assert not any(name.endswith("-v5") for name in known)
  assert sum(human_normalized_score(name, 0.0) is not None for name in known) == 26  # All of Atari 100k.


@pytest.mark.parametrize(("game", "actions"), MINIMAL_ACTIONS.items())
def test_spec(game, actions):
  assert envs.spec(f"atari/{game}") == (actions, (64, 64, 3))


@pytest.mark.parametrize("name", ["catch", "atari/Pong"])
def test_made_environments_keep_their_spec(name):
  env = envs.make(name, num_envs=2, seed=0, life_loss_ends=True, max_episode_steps=3, num_threads=1)
  assert env.spec == envs.spec(name)
  assert env.num_envs == 2
  assert env.frames_per_step == (1 if name == "catch" else 4)
  assert env.reset().shape == (2, *env.spec.observation_shape)
  truncated = [env.step(np.full(2, env.spec.num_actions - 1)).truncated.all() for _ in range(3)]
  assert truncated == [False, False, True]
  env.close()


@pytest.mark.parametrize(
  ("name", "tail"),
  [
    ("atari/breakout", "; nearest: atari/Breakout"),
    ("Catch", "; nearest: catch"),
    ("Pong", "; nearest: atari/Pong"),
    ("ALE/Breakout-v5", "; nearest: atari/Breakout"),
    ("atari/Pnog", "; nearest: atari/Pong"),
    ("atari/MsPacMan2", "; nearest: atari/MsPacman"),
  ],
)
def test_unknown_names_suggest_the_right_one(name, tail):
  for function in (envs.validate, envs.spec, lambda n: envs.make(n, num_envs=1, seed=0, life_loss_ends=True)):
    with pytest.raises(UserError) as error:
      function(name)
    message = str(error.value)
    assert repr(name) in message
    assert tail in message
    assert "\n" not in message


def test_name_like_nothing_gets_a_short_listing():
  with pytest.raises(UserError) as error:
    envs.validate("0123456789")
  message = str(error.value)
  assert "known: catch, " in message
  assert f"({len(envs.names())} in all)" in message
  assert len(message) < 200


def test_nearest():
  assert nearest("x", []) == ""
  assert nearest("zzz", ["ab", "cd"]) == "; known: ab, cd"
  assert nearest("BETA", ["beta", "betas", "alpha"]) == "; nearest: beta"  # Only the case differs.
  assert nearest("beter", ["alpha", "betas", "beta"]) == "; nearest: beta, betas"  # Likeliest first.


@pytest.mark.parametrize("name", ["catch", "atari/Pong"])
@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("num_envs", 0),
    ("num_envs", -3),
    ("seed", -1),
    ("seed", 2**31 - 1),  # The second environment would be seeded with 2**31.
    ("max_episode_steps", 0),
    ("num_threads", -1),
  ],
)
def test_numbers_out_of_range_name_the_field(name, field, value):
  arguments = {"num_envs": 2, "seed": 0, "life_loss_ends": False} | {field: value}
  with pytest.raises(UserError, match=rf"{field} is {value};"):
    envs.make(name, **arguments)
