"""Flax modules: networks without losses. Images and latents are NHWC."""
