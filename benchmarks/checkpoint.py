"""What saving costs: python -m benchmarks.checkpoint [--gib=1]

Saves a state of some GiB again and again while matrix products keep the device busy,
and reads it back. "stall" is how long the loop waits in `save`, the copy off the device
included; "commit" is until the checkpoint is whole; "interval" is the time between two
saves, here the shortest: a save begins when the one before is hashed. Beside them the
same bytes written by `numpy.save` and flushed to the disk.
"""

import argparse
import json
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from clj import sharding
from clj.runs.checkpoint import Checkpoints


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--gib", type=float, default=1.0)
  parser.add_argument("--saves", type=int, default=3)
  arguments = parser.parse_args()
  mesh = sharding.make_mesh()
  rows = int(arguments.gib * 2**30 / 4 / 4096 / 16)
  state = {
    f"layer{i}": jax.device_put(
      jax.random.normal(jax.random.key(i), (rows, 4096)), sharding.replicated(mesh)
    )
    for i in range(16)
  }
  size = sum(x.nbytes for x in state.values())
  busy = jnp.ones((1024, 1024)) / 1024
  results = []
  with tempfile.TemporaryDirectory(dir=os.getcwd()) as directory:
    checkpoints = Checkpoints(directory)
    for step in range(1, arguments.saves + 1):
      began = time.monotonic()
      checkpoints.save(step, state, {}, {})
      stall = time.monotonic() - began
      while step not in checkpoints.steps():
        busy = (busy @ busy).block_until_ready()
      commit = time.monotonic() - began
      checkpoints.wait()
      results.append((stall, commit, time.monotonic() - began))
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    began = time.monotonic()
    restored, _, _ = checkpoints.restore(abstract)
    jax.block_until_ready(restored)
    restore = time.monotonic() - began
    checkpoints.close()
    began = time.monotonic()
    with open(os.path.join(directory, "plain.npy"), "wb") as file:
      for value in state.values():
        np.save(file, np.asarray(value))
      file.flush()
      os.fsync(file.fileno())
    plain = time.monotonic() - began
  stall, commit, hashed = (float(np.median(x)) for x in zip(*results))
  line = {
    "gib": size / 2**30,
    "stall_s": stall,
    "commit_s": commit,
    "hashed_s": hashed,
    "restore_with_check_s": restore,
    "numpy_save_s": plain,
    "stall_share_of_interval": stall / hashed,
    "commit_over_numpy": commit / plain,
    # Saving this often, the loop would wait 5 % of the time.
    "interval_for_5_percent_s": 20 * stall,
  }
  print(json.dumps(line))
  for key, value in line.items():
    print(f"{key:26s} {value:10.3f}")


if __name__ == "__main__":
  main()
