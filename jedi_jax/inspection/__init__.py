"""Looking at a trained model: real games recorded, dreams of the same games, and figures that tell what is weak."""
