"""A small environment of Gymnasium, whose games repeat themselves or not."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Walk(gymnasium.Env):
  """The edge of a block moves left and right on 32 x 32 pixels, from a random column."""

  observation_space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
  action_space = spaces.Discrete(3)

  def __init__(self, repeats=True):
    self.random = None if repeats else np.random.default_rng()

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.column = int((self.random or self.np_random).integers(8, 24))
    return self.draw(), {}

  def step(self, action):
    self.column += action - 1
    return self.draw(), float(self.column == 31), self.column in (0, 31), False, {}

  def draw(self):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, self.column :] = 255
    return image


def register(monkeypatch):
  """Registers `gym/test/Walk-v0` and, with games that do not repeat, `gym/test/Random-v0` for one test."""
  monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
  monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)
  gymnasium.register("test/Walk-v0", Walk, max_episode_steps=30)
  gymnasium.register("test/Random-v0", Walk, max_episode_steps=30, kwargs={"repeats": False})
