"""Models: parameters, networks and mathematics composed into pure functions. No loop, no devices, no files."""
