"""Pure mathematics on arrays: no parameters, no state."""
