"""Attention written out against the kernel, in the gradient of image towers.

    python -m benchmarks.attention [--topology=v5e:2x2]
      [--cases=clip_vit_b16:224:128,siglip_l16:512:16]

A case is a tower of `models.image`, the side of its images, and their number on a
device. The layers are a scan with remat, in bfloat16. Prints JSON lines: what a device
reads and writes in its main memory, its temporaries and FLOPs, as `clj.plan` counts
them in the compiled program (libtpu is needed, a TPU is not). With --topology=local the
gradient also runs, on one GPU: seconds, the median of 10.
"""

import argparse
import json
import statistics
import time

from clj import plan

CASES = [
  "clip_vit_b16:224:128",  # 197 tokens
  "siglip_l16:256:64",  # 256
  "siglip_so400m14:224:64",  # 256, heads of width 72
  "clip_vit_l14_336:336:32",  # 577
  "siglip_so400m14:384:16",  # 729
  "siglip_l16:512:16",  # 1024
]


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--topology", default="v5e:2x2", help="as clj.plan takes it")
  parser.add_argument("--cases", default=",".join(CASES), help="TOWER:SIDE:IMAGES")
  parser.add_argument("--forms", default="plain,flash", help="of attention")
  arguments = parser.parse_args()
  plan.prepare(arguments.topology, 1)
  import jax
  import jax.numpy as jnp

  from clj import models, sharding
  from clj.planning import hlo

  topology = plan.Topology(arguments.topology)
  mesh = sharding.make_mesh(devices=topology.devices)
  whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)

  def report(case, form):
    name, side, images = case.split(":")
    network = models.image(
      name, dtype="bfloat16", scan=True, remat=True, attention=form
    )
    shape = (int(images) * mesh.size, int(side), int(side), 3)
    init = lambda: network.init(jax.random.key(0), jnp.zeros((1, *shape[1:])))[0]

    def loss(params, x):
      y, _ = network.apply(params, {}, x, train=True)
      return jnp.square(y).mean()

    params = jax.eval_shape(init)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with jax.set_mesh(mesh):
      compiled = (
        jax.jit(jax.grad(loss), in_shardings=(whole, rows), out_shardings=whole)
        .lower(params, x)
        .compile()
      )
      cost = hlo.analyse(compiled.as_text())
      temporaries = compiled.memory_analysis().temp_size_in_bytes
      record = {
        "case": case,
        "attention": form,
        "device": topology.kind,
        "hbm_gb": round(cost.hbm_bytes / 1e9, 2),
        "temporaries_gib": round(temporaries / 2**30, 2),
        "tflop": round(cost.flops / 1e12, 2),
      }
      if arguments.topology == "local":
        params = jax.jit(init, out_shardings=whole)()
        x = jax.jit(lambda: jnp.full(shape, 0.5), out_shardings=rows)()
        record["seconds"] = seconds(lambda: compiled(params, x))
    return record

  def seconds(run):
    times = []
    for _ in range(11):
      start = time.perf_counter()
      jax.block_until_ready(run())
      times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

  for case in arguments.cases.split(","):
    for form in arguments.forms.split(","):
      print(json.dumps(report(case, form)), flush=True)


if __name__ == "__main__":
  main()
