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


GOLDEN_DIRS = "../shared/golden:../shared/golden2"


@pytest.fixture(scope="session")
def golden_dirs():
  """The directories of golden values; tests that need them skip where none is there."""
  paths = os.environ.get("CLJ_GOLDEN_DIR", GOLDEN_DIRS).split(":")
  if not (there := tuple(path for path in paths if os.path.isdir(path))):
    pytest.skip(f"no golden values at {':'.join(paths)!r}; set CLJ_GOLDEN_DIR")
  return there


@pytest.fixture(scope="session")
def golden_file(golden_dirs):
  """The path of a golden file, by its name within whichever directory has it.

  Where not all of the directories are there, tests of what the others hold skip.
  """

  def find(name):
    paths = [os.path.join(path, name) for path in golden_dirs]
    if found := [path for path in paths if os.path.exists(path)]:
      return found[0]
    if len(golden_dirs) < len(GOLDEN_DIRS.split(":")):
      pytest.skip(f"no {name} in {':'.join(golden_dirs)!r}; CLJ_GOLDEN_DIR takes more")
    return pytest.fail(f"no {name} in {':'.join(golden_dirs)!r}")

  return find


@pytest.fixture(scope="session")
def tfds_data_dir():
  """A prepared TFDS directory; tests that need real data skip where it is absent."""
  path = os.environ.get("TFDS_DATA_DIR", "../shared/data")
  if not os.path.isdir(path):
    pytest.skip(f"no prepared TFDS data at {path!r}; set TFDS_DATA_DIR")
  return path
