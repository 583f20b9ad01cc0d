import copy
import json

import numpy as np
import pytest

from jedi_jax.errors import UserError
from jedi_jax.inspection import diagnosis


@pytest.fixture(scope="module")
def figures(agent, episodes):
  return diagnosis.diagnose(agent, episodes, seed=1, segments=64)


def test_every_figure_is_there_and_is_json(figures, agent):
  assert json.loads(json.dumps(figures)) == figures
  assert set(figures) == {
    "segments", "latents", "denoising", "open_loop", "sampler", "rewards_ends", "value", "weakest"
  }  # fmt: skip
  horizon = agent.config.actor_critic.horizon
  assert len(figures["open_loop"]["error"]) == len(figures["open_loop"]["copying"]) == horizon
  assert figures["latents"]["latent_std"] > 0
  assert 1 <= figures["latents"]["latent_rank"] <= 4
  assert 0 < figures["latents"]["latent_deviation"] <= figures["latents"]["latent_std"]
  assert figures["latents"]["latent_change"] > 0
  assert figures["sampler"]["calibration"] > 0
  first = {name: figures["open_loop"][name][0] for name in ("error", "copying")}
  assert figures["sampler"]["error"] == pytest.approx(first["error"] / first["copying"])
  d = figures["denoising"]
  assert d["sigma"][0] == pytest.approx(agent.config.denoiser.sigma_min)
  assert d["sigma"][-1] == pytest.approx(agent.config.denoiser.sigma_max)
  assert len(d["sigma"]) == len(d["loss"]) == len(d["without_network"])
  assert np.all(np.isfinite(d["loss"] + d["without_network"]))
  assert len(figures["value"]["predicted"]) == len(figures["value"]["realised"]) == 5
  assert figures["value"]["predicted"] == sorted(figures["value"]["predicted"])


def test_every_real_step_is_counted_once(figures, episodes):
  steps = sum(len(episode.actions) for episode in episodes)
  ends = sum(int(episode.ends.sum()) for episode in episodes)
  for source in ("on_real", "in_imagination"):
    got = figures["rewards_ends"][source]
    assert got["end_count_yes"] == ends
    assert got["end_count_no"] == steps - ends
    assert sum(got[f"reward_count_{sign}"] for sign in ("-1", "0", "+1")) == steps


def test_it_repeats_itself(figures, agent, episodes):
  assert diagnosis.diagnose(agent, episodes, seed=1, segments=64) == figures


def test_copying_is_the_error_of_the_last_latent(figures, agent, episodes):
  model, params = agent.model, agent.params
  squares = {1: [], 2: []}
  every = []
  horizon = agent.config.actor_critic.horizon
  for episode in episodes:
    frames = episode.observations[None]
    latents = np.asarray(model.encode(params, frames, np.ones(frames.shape[:2], bool)))[0]
    for start in range(0, len(episode.actions), horizon):
      for step in (1, 2):
        if start + step < len(latents):
          squares[step].append(((latents[start + step] - latents[start]) ** 2).sum())
      # Every frame of a window counts, those before its start too.
      every += list(latents[max(0, start - model.conditioning_frames + 1) : start + horizon + 1])
  variance = ((np.asarray(every) - np.mean(every, axis=0)) ** 2).sum(axis=(1, 2, 3)).mean()
  for step in (1, 2):
    expected = np.sqrt(np.mean(squares[step]) / variance)
    assert figures["open_loop"]["copying"][step - 1] == pytest.approx(expected, rel=1e-3)


def test_bias_and_correlation_by_hand(figures, agent, episodes):
  values, returns = [], []
  for episode in episodes:
    frames = episode.observations[None]
    latents = agent.model.encode(agent.params, frames, np.ones(frames.shape[:2], bool))
    _, v, _ = agent.model.actor_critic.apply(agent.params["actor_critic"], latents, agent.model.initial_state(1))
    v = np.asarray(v, np.float64)[0]
    rewards = np.sign(episode.rewards)
    steps = len(rewards)
    last = 0.0 if episode.ends[-1] else v[-1]
    gamma = agent.config.actor_critic.gamma
    for t in range(steps):
      discounts = gamma ** np.arange(steps - t)
      returns.append((discounts * rewards[t:]).sum() + gamma ** (steps - t) * last)
    values += list(v[:-1])
  assert figures["value"]["bias"] == pytest.approx(np.mean(values) - np.mean(returns), abs=1e-4)
  assert figures["value"]["correlation"] == pytest.approx(np.corrcoef(values, returns)[0, 1], abs=1e-3)


def test_nothing_to_look_at_is_refused(agent):
  with pytest.raises(UserError, match="no episode"):
    diagnosis.diagnose(agent, [])


GOOD = {
  "latents": {"latent_std": 0.4, "latent_deviation": 0.3, "latent_rank": 6.0},
  "sampler": {"calibration": 0.9, "error": 0.1},
  "open_loop": {"error": [0.05, 0.1], "copying": [1.0, 1.4]},
  "rewards_ends": {"on_real": {"f1": 0.98}, "in_imagination": {"f1": 0.97}},
  "value": {"correlation": 0.8},
}


@pytest.mark.parametrize(("changes", "words"), [
  ({}, ["critic", "0.80", "fault 0.20"]),
  ({("latents", "latent_deviation"): 1e-4}, ["encoder", "collapsed"]),
  ({("sampler", "calibration"): 0.0, ("sampler", "error"): 0.6}, ["sampler", "0.00", "0.60", "fault 0.60"]),
  ({("sampler", "calibration"): 5.0, ("sampler", "error"): 0.5}, ["sampler", "5.00", "fault 0.40"]),
  ({("latents", "latent_rank"): 1.1}, ["encoder", "collapsed"]),
  ({("rewards_ends", "on_real", "f1"): 0.2}, ["reward / end model", "0.20", "even on real latents"]),
  ({("rewards_ends", "in_imagination", "f1"): 0.4}, ["dynamics", "0.98 to 0.40 in imagination"]),
  ({("open_loop", "error"): [0.5, 1.3]}, ["dynamics", "after 2 steps", "1.30", "copying 1.40"]),
  ({("value", "correlation"): -0.1}, ["critic", "-0.10", "fault 1.00"]),
  ({("rewards_ends", "on_real", "f1"): None}, ["critic", "not judged"]),
])  # fmt: skip
def test_the_weakest_part_is_named(changes, words):
  figures = copy.deepcopy(GOOD)
  for (*parents, name), value in changes.items():
    node = figures
    for parent in parents:
      node = node[parent]
    node[name] = value
  sentence = diagnosis.weakest(figures)
  for word in words:
    assert word in sentence
  if "collapsed" in words:
    assert "critic" in diagnosis.weakest(figures, encoder=False)
