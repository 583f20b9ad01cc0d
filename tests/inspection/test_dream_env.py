import dataclasses
import pathlib
import re
import sys
import warnings

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from refusals import refused

import jedi_jax
from jedi_jax import replay as replay_lib
from jedi_jax.agent import Agent
from jedi_jax.datasets import load_replay
from jedi_jax.inspection import recording
from jedi_jax.models import imagination
from jedi_jax.runs import workdir

N = 3
USAGE = pathlib.Path(__file__).parents[2] / "docs" / "usage.md"


@pytest.fixture(scope="module")
def starts(agent, episodes):
  """Sixteen starts of six games."""
  return recording.windows(episodes, before=agent.model.conditioning_frames, after=0, stride=4)


@pytest.fixture(scope="module")
def single(agent, starts):
  return jedi_jax.dream_env(agent, starts=starts, max_episode_steps=4)


@pytest.fixture(scope="module")
def vector(agent, starts):
  return jedi_jax.dream_env(agent, num_envs=N, starts=starts, max_episode_steps=4)


@pytest.fixture(scope="module")
def latents(agent, starts):
  return jedi_jax.dream_env(agent, num_envs=N, observations="latents", starts=starts, max_episode_steps=None)


def test_gymnasium_approves(single):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*not having a spec")
    check_env(single)
  assert isinstance(single, gymnasium.Env)
  assert single.observation_space == gymnasium.spaces.Box(0, 255, (24, 24, 3), np.uint8)
  assert single.action_space == gymnasium.spaces.Discrete(3)
  assert single.render().shape == (24, 24, 3)


def test_several_dreams_have_the_spaces_of_gymnasium(vector, latents, agent):
  assert isinstance(vector, gymnasium.vector.VectorEnv)
  assert vector.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.SAME_STEP
  for env, shape, dtype in ((vector, (24, 24, 3), np.uint8), (latents, agent.model.latent_shape, np.float32)):
    observations, infos = env.reset(seed=1)
    assert observations in env.observation_space
    assert (env.single_observation_space.shape, env.single_observation_space.dtype) == (shape, dtype)
    assert infos == {}
    observations, rewards, terminated, truncated, _ = env.step(env.action_space.sample())
    assert observations in env.observation_space
    assert rewards.dtype == np.float32
    assert set(rewards) <= {-1.0, 0.0, 1.0}
    assert terminated.dtype == truncated.dtype == bool
    assert len(env.render()) == N


def play(env, steps, seed):
  """Takes the same actions at every call; returns the observations, rewards and ends of each step."""
  random = np.random.default_rng(0)
  first, _ = env.reset(seed=seed)
  taken = [random.integers(3, size=N) for _ in range(steps)]
  return [first], [env.step(actions)[:4] for actions in taken], taken


def test_the_seed_of_the_reset_decides(latents):
  (first,), steps, _ = play(latents, 3, seed=5)
  (again,), steps_again, _ = play(latents, 3, seed=5)
  (other,), _, _ = play(latents, 3, seed=6)
  np.testing.assert_array_equal(first, again)
  for step, same in zip(steps, steps_again, strict=True):
    for x, y in zip(step, same, strict=True):
      np.testing.assert_array_equal(x, y)
  np.testing.assert_allclose(first[1:], other[:-1], atol=1e-4)  # Environment i has the seed `seed + i`.
  unseeded, _ = latents.reset()
  assert np.any(unseeded != first)


def test_a_dream_is_the_imagination_of_training(agent, starts, latents):
  """The same start, actions and random numbers, imagined in one scan under given actions."""
  model, steps = agent.model, 4
  segment = jax.tree.map(lambda x: x[:1], starts)
  one = jedi_jax.dream_env(agent, observations="latents", starts=segment)
  likely = jedi_jax.dream_env(agent, observations="latents", starts=segment, rewards="most_likely")
  first, _ = one.reset(seed=7)
  likely.reset(seed=7)
  dreamed, actions = [first], [0, 2, 1, 1]
  rewards, likely_rewards, ended = [], [], []
  for action in actions:
    if not (ended and ended[-1]):
      observation, reward, terminated, _, _ = one.step(action)
      likely_rewards.append(likely.step(action)[1])
      dreamed.append(observation)
      rewards.append(reward)
      ended.append(terminated)
  steps = len(rewards)

  key = jax.random.key(np.random.SeedSequence(7).generate_state(1)[0])
  keys = [jax.random.fold_in(key, 1 + t)[None] for t in range(steps)]  # 0 is the reset.
  draws = [imagination.draw_noise(model.dynamics, key, horizon=1, num_actions=3) for key in keys]
  noise = jax.tree.map(lambda *x: jnp.concatenate(x), *draws)
  trajectory = jax.jit(
    lambda params: imagination.imagine(
      model.dynamics,
      model.reward_end,
      model.actor_critic,
      params,
      model.encode(params, segment.observations, segment.mask),
      segment.actions[:, :-1],
      segment.mask,
      noise,
      actions=jnp.asarray([actions[:steps]], jnp.int32),
    )
  )(agent.params)
  np.testing.assert_allclose(dreamed, trajectory.latents[0], rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(rewards, trajectory.rewards[0])
  np.testing.assert_array_equal(likely_rewards, np.argmax(trajectory.reward_logits[0], axis=-1) - 1)
  np.testing.assert_array_equal(ended, trajectory.ends[0])


def test_a_batch_dreams_what_each_one_would_and_starts_again_in_the_same_step(single, vector):
  """The first environment of three against a single one with its seed, over several episodes of at most four steps."""
  observations, _ = vector.reset(seed=3)
  alone, _ = single.reset(seed=3)
  close = {"atol": 1}  # Grey levels.
  np.testing.assert_allclose(observations[0].astype(int), alone.astype(int), **close)
  random, lengths, length = np.random.default_rng(1), [], 0
  for _ in range(12):
    actions = random.integers(3, size=N)
    observations, rewards, terminated, truncated, infos = vector.step(actions)
    alone, reward, ended, cut, _ = single.step(int(actions[0]))
    assert (rewards[0], terminated[0], truncated[0]) == (reward, ended, cut)
    over = terminated | truncated
    np.testing.assert_array_equal(infos.get("_final_obs", np.zeros(N, bool)), over)
    length += 1
    if ended or cut:
      lengths.append(length)
      assert not (ended and cut)
      assert cut <= (length == 4)
      length = 0
      np.testing.assert_allclose(infos["final_obs"][0].astype(int), alone.astype(int), **close)
      refused(lambda: single.step(0), "reset")
      alone, _ = single.reset()
    np.testing.assert_allclose(observations[0].astype(int), alone.astype(int), **close)
  assert len(lengths) >= 2
  assert max(lengths) <= 4


def test_the_averaged_denoiser_imagines(agent, starts, latents):
  other = jax.tree.map(lambda x: 1.5 * x, agent.params["denoiser"])
  averaged = Agent(agent.model, {**agent.params, "average_denoiser": other}, agent.config)
  replaced = Agent(agent.model, {**agent.params, "denoiser": other}, agent.config)
  found = []
  for one in (averaged, replaced):
    env = jedi_jax.dream_env(one, num_envs=N, observations="latents", starts=starts, max_episode_steps=None)
    found.append(play(env, 1, seed=2)[1][0][0])
  np.testing.assert_array_equal(*found)
  assert np.any(found[0] != play(latents, 1, seed=2)[1][0][0])


def test_a_run_starts_from_its_replay_as_training_does(finished_run, agent):
  env = jedi_jax.dream_env(finished_run, num_envs=N, observations="latents")
  found, _ = env.reset(seed=11)
  replay, config = load_replay(workdir.read(finished_run)), agent.config.replay
  assert replay.num_episodes >= 4
  seeds = [np.random.SeedSequence(11 + i).generate_state(1)[0] for i in range(N)]
  keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), 0) for seed in seeds])
  segment = replay_lib.sample(
    jax.device_put(replay),
    keys,
    length=agent.model.conditioning_frames,
    age_weights=config.age_weights,
    age_groups=config.age_groups,
    beyond_end=False,
    final_frames=False,
  )
  expected = agent.model.encode(agent.params, segment.observations, segment.mask)[:, -1]
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
  assert np.all(segment.mask[:, -1])


def test_episodes_of_ones_own_are_starts(agent, episodes):
  env = jedi_jax.dream_env(agent, num_envs=N, starts=episodes[:1], observations="latents")
  found, _ = env.reset(seed=0)
  frames = jnp.asarray(episodes[0].observations[:-1])[:, None]  # No action was taken on the last one.
  known = agent.model.encode(agent.params, frames, jnp.ones(frames.shape[:2], bool))[:, 0]
  for latent in found:
    assert np.min(np.max(np.abs(known - latent), axis=(1, 2, 3))) < 1e-3


def run_example(name, directory, run):
  """Runs an example of docs/usage.md with another run; returns its names."""
  code = re.search(rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- end -->", USAGE.read_text(), re.DOTALL).group(1)
  assert code.count(f'"{directory}"') == 2
  names = {}
  exec(code.replace(f'"{directory}"', repr(str(run))).replace("1_000", "24"), names)
  return names


def test_the_example_of_the_docs_runs(finished_run, capsys):
  names = run_example("dream-env", "runs/catch", finished_run)
  assert re.fullmatch(r"return -?\d+\.0\n", capsys.readouterr().out)
  assert names["latents"].shape == (16, *names["envs"].single_observation_space.shape)


def test_the_example_of_a_probe_runs(finished_run):
  names = run_example("fit-probe", "runs/breakout-0", finished_run)
  observation, _ = names["env"].reset(seed=0)
  assert observation.shape == names["agent"].model.spec.observation_shape


def test_bad_actions_and_seeds_are_one_line(agent, starts, single, vector):
  fresh = jedi_jax.dream_env(agent, starts=starts)
  refused(lambda: fresh.step(0), "call reset first")
  refused(lambda: jedi_jax.dream_env(agent, num_envs=2, starts=starts).step([0, 0]), "call reset first")
  vector.reset(seed=0)
  first, again = (single.reset(seed=seed)[0] for seed in (np.int64(3), 3))
  np.testing.assert_array_equal(first, again)
  for env, actions, part in (
    (single, 3, "0..2"),
    (single, -1, "0..2"),
    (single, 1.0, "float64"),
    (single, True, "bool"),
    (single, [1], "(1,)"),
    (single, "left", "an integer"),
    (vector, [0, 1], "(3,)"),
    (vector, 1, "(3,)"),
    (vector, [0, 1, 3], "0..2"),
    (vector, [0.0, 1.0, 2.0], "float64"),
    (vector, [[0], [1, 2], 3], "(3,)"),
  ):
    refused(lambda env=env, actions=actions: env.step(actions), "actions", part)
  for env, seed in ((single, -1), (single, 1.5), (vector, "x"), (vector, [0, 1]), (vector, [0, 1, -1])):
    refused(lambda env=env, seed=seed: env.reset(seed=seed), "seed")
  vector.reset(seed=[4, None, 6])  # As Gymnasium's own vector environments take them.
  assert single.step(np.int64(2))[0].shape == (24, 24, 3)


def test_bad_arguments_are_one_line(agent, starts, episodes, tmp_path, monkeypatch):
  def dream(agent=agent, **options):
    return lambda: jedi_jax.dream_env(agent, **{"starts": starts, **options})

  refused(dream(observations="image"), "observations='image'", "nearest: images")
  refused(dream(rewards="likely"), "rewards='likely'", "most_likely")
  for number in (0, -1, 2.0, True, "4"):
    refused(dream(num_envs=number), f"num_envs={number!r}")
    refused(dream(max_episode_steps=number), f"max_episode_steps={number!r}")
  refused(dream(agent=7), "int")
  refused(dream(agent=tmp_path), str(tmp_path))
  refused(dream(starts=tmp_path), str(tmp_path))
  refused(dream(starts=None), "starts")
  refused(dream(starts=7), "int")
  refused(dream(starts=[]), "no episodes")
  blind = Agent(dataclasses.replace(agent.model, decode=None), agent.params, agent.config)
  refused(dream(agent=blind), "latents", "probe")
  sized = [episode._replace(observations=episode.observations[:, :12]) for episode in episodes]
  refused(dream(starts=sized), "(12, 24, 3)")
  refused(dream(starts=[episodes[0]._replace(actions=episodes[0].actions + 3)]), "0..2")
  refused(dream(starts=starts.replace(mask=jnp.zeros_like(starts.mask))), "padding")
  refused(dream(starts=starts.replace(mask=starts.mask[:, 1:])), "2 frames")
  refused(dream(starts=starts.replace(observations=starts.observations / 255)), "uint8")
  monkeypatch.setitem(sys.modules, "jedi_jax.inspection.gymnasium_envs", None)
  monkeypatch.delattr(jedi_jax.inspection, "gymnasium_envs", raising=False)
  refused(dream(), "pip install")


def test_a_run_without_checkpoint_has_no_starts(agent, finished_run, tmp_path):
  (tmp_path / "config.json").write_bytes((finished_run / "config.json").read_bytes())
  refused(lambda: jedi_jax.dream_env(agent, starts=tmp_path), "no replay", "starts")
