"""Trains PPO of Stable-Baselines3 in the dream of a run, and scores it in the real game.

  python benchmarks/dream_ppo.py --workdir=runs/catch/seed_0 --steps=100000 --name=dream_ppo

PPO sees decoded images and takes no step of the real game before it is scored. The agent of the run and a random policy
are scored on the same number of games. Needs pip install '.[sb3]'. The result is written to
benchmarks/results/learning/<name>.json.
"""

import time
from typing import Any

import numpy as np
import record
from absl import flags

import jedi_jax
from jedi_jax.errors import UserError
from jedi_jax.evaluation.evaluate import describe_results
from jedi_jax.runs import program

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run with a decoder or probe.")
_STEPS = flags.DEFINE_integer("steps", 100_000, "Dreamed steps of PPO.", lower_bound=1, upper_bound=10**9)
_ENVS = flags.DEFINE_integer("num_envs", 32, "Dreams side by side.", lower_bound=1, upper_bound=10_000)
_LIMIT = flags.DEFINE_integer("max_episode_steps", 100, "Steps after which a dream is cut.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds of PPO.", lower_bound=1, upper_bound=1_000)
_EPISODES = flags.DEFINE_integer("episodes", 100, "Games that score a policy.", lower_bound=1, upper_bound=10_000)
_NAME = flags.DEFINE_string("name", "dream_ppo", "Name of the record.")

_ROLLOUT = 32
"""Steps of each dream between two updates of PPO."""


def vec_env(env: Any) -> Any:
  """Returns a `DreamVectorEnv` as a `VecEnv` of Stable-Baselines3, which names the ends of episodes otherwise."""
  from stable_baselines3.common.vec_env import VecEnv

  class Dreams(VecEnv):
    """The methods that PPO calls; `env_method` and `set_attr` are not supported."""

    def __init__(self) -> None:
      super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> np.ndarray:
      observations, _ = env.reset(seed=self._seeds)
      self._reset_seeds()
      return observations

    def step_async(self, actions: np.ndarray) -> None:
      self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
      observations, rewards, terminated, truncated, infos = env.step(self._actions)
      over: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
      for i in np.flatnonzero(terminated | truncated):
        over[i] = {"terminal_observation": infos["final_obs"][i], "TimeLimit.truncated": bool(truncated[i])}
      return observations, rewards, terminated | truncated, over

    def close(self) -> None:
      env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
      return [getattr(env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
      raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
      raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
      return [False for _ in self._get_indices(indices)]

  return Dreams()


def train(directory: Any, *, steps: int, num_envs: int, seed: int, max_episode_steps: int = 100) -> tuple[Any, int]:
  """Trains PPO in the dream of a run.

  Returns:
    A policy as `jedi_jax.evaluate` takes it, and the number of steps dreamed: whole rollouts, so `steps` or more.

  Raises:
    UserError: if Stable-Baselines3 is not installed, or there is no dream; see `jedi_jax.dream_env`.
  """
  try:
    from stable_baselines3 import PPO
  except ImportError:
    raise UserError("PPO needs Stable-Baselines3: pip install stable-baselines3") from None
  env = jedi_jax.dream_env(directory, num_envs=num_envs, max_episode_steps=max_episode_steps)
  model = PPO(
    "MlpPolicy",
    vec_env(env),
    n_steps=_ROLLOUT,
    batch_size=min(256, _ROLLOUT * num_envs),
    learning_rate=1e-3,
    ent_coef=0.01,
    seed=seed,
    device="cpu",
  )
  model.learn(steps)
  return lambda observations, restart: model.predict(observations, deterministic=True)[0], model.num_timesteps


def main() -> None:
  """Trains, scores, prints a table and writes the record."""
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: name the directory of a run")
  program.enable_compilation_cache()
  started = record.machine()
  agent = jedi_jax.load_agent(_WORKDIR.value)
  name = agent.config.env.name
  rows: list[dict[str, Any]] = []

  def score(policy: Any, about: dict[str, Any]) -> None:
    results = describe_results(name, jedi_jax.evaluate(policy, name, episodes=_EPISODES.value))
    rows.append({**about, "env": name, **results})
    print({key: value for key, value in rows[-1].items() if not isinstance(value, list)}, flush=True)

  score(None, {"policy": "random"})
  score(agent, {"policy": "agent of the run"})
  for seed in range(_SEEDS.value):
    begun = time.monotonic()
    how = {"steps": _STEPS.value, "num_envs": _ENVS.value, "max_episode_steps": _LIMIT.value}
    policy, steps = train(_WORKDIR.value, seed=seed, **how)
    about = {"policy": "PPO in the dream", "seed": seed, "dreamed_steps": steps}
    score(policy, {**about, "seconds": time.monotonic() - begun})
  print(record.table(rows, ["policy", "seed", "dreamed_steps", "mean_return", "seconds"]))
  print(f"written to {record.write(f'learning/{_NAME.value}', rows, started=started)}")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
