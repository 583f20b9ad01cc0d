"""Compilation without LLVM's optimisations: compiling is nearly all that the tests of small networks take."""

import functools

import jax

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
