"""Programs for TPUs that are not here, compiled inside the tests."""

import contextlib
import importlib.util
import os

import jax
import pytest

from clj.planning import chips


@contextlib.contextmanager
def compiler():
  """The TPU compiler beside the CPU's, or a skip where it is not installed."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  jax.devices()  # the CPU's flags are read now: the TPU compiler ends on them
  saved = os.environ.copy()
  written = jax.config.jax_persistent_cache_min_compile_time_secs
  chips.quiet_compiler()
  # Programs for absent devices are written to the cache but cannot be read from it.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
  try:
    yield chips.Topology
  finally:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", written)
    os.environ.clear()
    os.environ.update(saved)
