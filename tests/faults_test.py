"""benchmarks.faults at test size: killed runs, a full disk, damage, a shard, clocks."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_run_survives_what_the_benchmark_does_to_it():
  done = subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.faults", "--kills=4", "--processes=1"),
      "--config=configs/simclr.py:smoke",
      *("--config.total_steps=40", "--config.checkpoint_every=5"),
      "--config.eval_every=20",
    ],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
    capture_output=True,
    text=True,
  )
  found = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
  wrong = [line for line in found if line.get("ok") is False]
  assert done.returncode == 0 and not wrong, (wrong, done.stderr[-2000:])
  judged = {line["fault"].split(",")[0] for line in found if "ok" in line}
  assert judged == {
    "kills",
    "disk full",
    "damaged checkpoint",
    "data shard removed",
    "clock a week back",
  }
