"""Names of actions, from which the page takes its keys: words of up, down, left, right and fire, or none."""

_ALE = (
  *("noop", "fire", "up", "right", "left", "down", "up right", "up left", "down right", "down left", "up fire"),
  *("right fire", "left fire", "down fire", "up right fire", "up left fire", "down right fire", "down left fire"),
)
"""The actions of the Arcade Learning Environment in their order."""

_ATARI = {
  "Breakout Kaboom": (0, 1, 3, 4),
  "Atlantis": (0, 1, 11, 12),
  "Freeway": (0, 2, 5),
  "Skiing": (0, 3, 4),
  "Frogger Pacman": (0, 2, 3, 4, 5),
  "AirRaid Carnival DemonAttack Galaxian NameThisGame Pong SpaceInvaders": (0, 1, 3, 4, 11, 12),
  "KingKong Qbert": (0, 1, 2, 3, 4, 5),
  "Bowling Pooyan UpNDown": (0, 1, 2, 5, 10, 13),
  "Assault": (0, 1, 2, 3, 4, 11, 12),
  "Gopher": (0, 1, 2, 3, 4, 10, 11, 12),
  "Phoenix": (0, 1, 3, 4, 5, 11, 12, 13),
  "Tutankham": (0, 2, 3, 4, 5, 10, 11, 12),
  "Asterix CrazyClimber Koolaid MsPacman": (0, 2, 3, 4, 5, 6, 7, 8, 9),
  "BeamRider": (0, 1, 2, 3, 4, 6, 7, 11, 12),
  "Enduro": (0, 1, 3, 4, 5, 8, 9, 11, 12),
  "VideoPinball": (0, 1, 2, 3, 4, 5, 10, 11, 12),
  "Amidar MrDo TimePilot WizardOfWor": (0, 1, 2, 3, 4, 5, 10, 11, 12, 13),
  "KungFuMaster": (0, 2, 3, 4, 5, 8, 9, 11, 12, 13, 14, 15, 16, 17),
}
"""Minimal action sets as indices into `_ALE`; games with 18 actions have all of them."""

_GYMNAX = {
  "Catch-bsuite": "left,noop,right",
  "Pong-misc": "noop,up,down",
  "Asterix": "noop,left,up,right,down",
  "Breakout": "noop,left,right",
  "Freeway": "noop,up,down",
  "Seaquest": "noop,left,up,right,down,fire",
  "SpaceInvaders": "noop,left,right,fire",
}


def action_names(env: str, num_actions: int) -> tuple[str, ...]:
  """Returns a name for each action of an environment.

  Args:
    env: name of the environment, such as `atari/Breakout?skip=2-6`.
    num_actions: A.

  Returns:
    A names: `noop`, or words of up, down, left, right and fire; `action 0` and so on where the names are not known.
  """
  family, _, game = env.partition("?")[0].rpartition("/")
  names: tuple[str, ...] = ()
  if (family, game) == ("", "catch"):
    names = ("left", "noop", "right")
  elif family in {"minatar", "gymnax"}:
    names = tuple(_GYMNAX.get(game.removesuffix("-MinAtar"), "").split(","))
  elif family == "atari":
    sets = [indices for games, indices in _ATARI.items() if game in games.split()]
    names = tuple(_ALE[i] for i in (sets[0] if sets else range(len(_ALE))))
  return names if len(names) == num_actions else tuple(f"action {i}" for i in range(num_actions))


def usual_speed(env: str) -> float:
  """Returns the steps a second at which an environment is played: 15 for Atari, its own speed, and 5 elsewhere."""
  return 15.0 if env.startswith("atari/") else 5.0
