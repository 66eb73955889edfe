"""One process of several: what it reads, computes and restores at chosen steps.

    python -m tests.pods_worker WORKDIR OUT COORDINATOR NUM_PROCESSES PROCESS_ID STEPS

Called as a function by the test, with all devices in one process, it is the reference.
"""

import functools
import sys

import jax
import numpy as np

from clj import sharding, train
from clj.data import open_data
from clj.evals.measure import make_evaluate
from clj.runs import checkpoint, processes, workdir


def probe(directory, steps, mesh_sizes=None):
  """This process's rows, loss, gradients and evaluation at the checkpoint of each step.

  Step 0 has the initial state. Returns dicts of NumPy arrays and floats by step.
  """
  config = workdir.read_config(directory)
  data, batch_size = config["data"], config["batch_size"]
  mesh = sharding.make_mesh(**(mesh_sizes or config["mesh"]))
  opened = open_data(data)
  sections = ("method", "model", "optim")
  found = {}
  with jax.set_mesh(mesh):
    read = lambda step: opened.batches(
      seed=config["seed"],
      batch_size=batch_size,
      step=step,
      rows=sharding.process_rows(batch_size, mesh),
    )
    program = train.build(
      train.batch_shapes(opened, batch_size, mesh),
      mesh,
      seed=config["seed"],
      batch_size=batch_size,
      total_steps=config["total_steps"],
      augment=data["augment"],
      **{key: config[key] for key in sections},
    )
    values = jax.jit(
      functools.partial(loss_and_gradients, program.method, program.augment),
      out_shardings=sharding.replicated(mesh),
    )
    evaluate = make_evaluate(
      program.method.embed,
      program.augment,
      opened,
      evals={"knn": {"k": 20}, "linear_probe": {"epochs": 3}, "diagnostics": {}},
      batch_size=batch_size,
    )
    for step in steps:
      if step:
        checkpoints = checkpoint.Checkpoints(directory)
        state, _, _ = checkpoints.restore(program.state, step)
      else:
        state = program.init(jax.random.key(config["seed"]))
      rows = next(read(step))
      found[step] = {
        "batch": rows,
        "values": jax.device_get(values(state, sharding.to_global(rows, mesh))),
        "evaluation": evaluate(state.params, state.extra, step, True),
      }
  return found


def loss_and_gradients(method, augment, state, batch):
  rng = jax.random.fold_in(state.rng, state.step)
  batch = augment(jax.random.fold_in(rng, 0), batch)

  def loss(params):
    key = jax.random.fold_in(rng, 1)
    return method.loss(params, state.extra, batch, key, state.step)[0]

  value, grads = jax.value_and_grad(loss)(state.params)
  leaves = jax.tree_util.tree_leaves_with_path((grads, state.params))
  return {"loss": value} | {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def main():
  directory, out, coordinator, count, index, steps, *mesh = sys.argv[1:]
  run = processes.Run(int(count), coordinator, int(index))
  processes.connect(run, heartbeat=processes.HEARTBEAT)
  sizes = dict(zip(sharding.AXES, map(int, mesh))) or None
  np.save(out, probe(directory, [int(s) for s in steps.split(",")], sizes))
  jax.distributed.shutdown()


if __name__ == "__main__":
  main()
