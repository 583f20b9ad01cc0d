"""Training: state, updates, the epoch, devices, the loop."""
