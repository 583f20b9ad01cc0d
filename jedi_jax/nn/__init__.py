"""Flax modules: networks without losses. Images and latents are [B, H, W, C]."""
