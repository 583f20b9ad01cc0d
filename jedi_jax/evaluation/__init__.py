"""Evaluation: plays whole games with a fixed policy, and aggregates and reports their scores."""

from jedi_jax.evaluation.episodes import EpisodeResult, Policy, random_policy, run_episodes
from jedi_jax.evaluation.scores import human_normalized_score

__all__ = ["EpisodeResult", "Policy", "human_normalized_score", "random_policy", "run_episodes"]
