"""The demo on 1 and on 8 devices: python -m benchmarks.devices [--steps=101]

The recipe and schedule of `configs/simclr.py` unchanged. A process with one device
trains and keeps the states of steps 0, 1, 10, 20 and 100; a process with eight devices
takes each of them one step further, and trains freely beside it. Training amplifies
float32 rounding, so the free losses part; from the same state one step may not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

AT = (0, 1, 10, 20, 100)


def losses(devices: int, directory: str, steps: int) -> dict:
  """Trains freely; with one device writes the states, else restores and steps them."""
  import jax

  from benchmarks.recipe import Recipe
  from clj.runs.checkpoint import Checkpoints
  from configs import simclr

  recipe = Recipe(simclr.get_config().to_dict())
  program = recipe.program
  checkpoints = Checkpoints(directory, keep=len(AT))
  result = {"free": [], "from_state": {}}
  with jax.set_mesh(recipe.mesh):
    state = program.init(jax.random.key(recipe.config["seed"]))
    for step in range(steps):
      if devices == 1 and step in AT:
        checkpoints.save(step, state, {}, {})
      state, metrics = program.step(state, recipe.batch(step))
      result["free"].append(float(metrics["loss"]))
    checkpoints.close()
    if devices > 1:
      for step in AT:
        if step < steps:
          state, _, _ = checkpoints.restore(program.state, step)
          _, metrics = program.step(state, recipe.batch(step))
          result["from_state"][step] = float(metrics["loss"])
  return result


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", type=int, default=101)
  parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
  parser.add_argument("--directory", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    found = losses(arguments.child, arguments.directory, arguments.steps)
    print(json.dumps(found))
    return
  results = {}
  with tempfile.TemporaryDirectory() as directory:
    for devices in (1, 8):
      child = subprocess.run(
        [
          *(sys.executable, "-m", "benchmarks.devices"),
          f"--child={devices}",
          f"--directory={directory}",
          f"--steps={arguments.steps}",
        ],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
      )
      results[devices] = json.loads(child.stdout.splitlines()[-1])
  print("step  loss, 1 device  from its state on 8  difference  free on 8  difference")
  for step, on_eight in results[8]["from_state"].items():
    one, free = results[1]["free"][int(step)], results[8]["free"][int(step)]
    print(
      json.dumps(
        {
          "step": int(step) + 1,
          "loss_1": one,
          "loss_8_same_state": on_eight,
          "difference": abs(on_eight - one),
          "loss_8_free": free,
          "difference_free": abs(free - one),
        }
      )
    )
    print(
      f"{int(step) + 1:4d}  {one:14.7f}  {on_eight:19.7f}  {abs(on_eight - one):10.1e}"
      f"  {free:9.5f}  {abs(free - one):10.1e}"
    )


if __name__ == "__main__":
  main()
