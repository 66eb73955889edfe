"""Eight faked CPU devices, strict shapes, and a compilation cache for this test run."""

import os
import tempfile

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# The programs are tiny and run once or twice: compiling them is what takes the time.
FLAGS = [
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
]
if jax.__version_info__ < (0, 11):  # later versions do not know it
  FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
  "jax_compilation_cache_dir",
  os.environ.get("CLJ_TEST_CACHE")
  or os.path.join(tempfile.gettempdir(), f"clj-test-cache-{os.getuid()}"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def golden_dir():
  """The directory of golden values; tests that need it skip where it is absent."""
  path = os.environ.get("CLJ_GOLDEN_DIR", "../shared/golden")
  if not os.path.isdir(path):
    pytest.skip(f"no golden values at {path!r}; set CLJ_GOLDEN_DIR")
  return path


@pytest.fixture(scope="session")
def tfds_data_dir():
  """A prepared TFDS directory; tests that need real data skip where it is absent."""
  path = os.environ.get("TFDS_DATA_DIR", "../shared/data")
  if not os.path.isdir(path):
    pytest.skip(f"no prepared TFDS data at {path!r}; set TFDS_DATA_DIR")
  return path
