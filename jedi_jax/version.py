"""The version of the package, importable without importing JAX."""

__version__ = "0.1.0"
