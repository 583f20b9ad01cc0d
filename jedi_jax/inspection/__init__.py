"""Inspection of trained models: recorded games, films of imagined games, and a diagnosis of each part."""
