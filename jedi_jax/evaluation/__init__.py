"""Evaluation: whole games played by a fixed policy, and their scores set against random and human play."""

from jedi_jax.evaluation.episodes import EpisodeResult, Policy, random_policy, run_episodes
from jedi_jax.evaluation.scores import human_normalized_score

__all__ = ["EpisodeResult", "Policy", "human_normalized_score", "random_policy", "run_episodes"]
