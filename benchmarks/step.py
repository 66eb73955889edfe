"""Speed of a SimCLR train step on given views, beside PyTorch doing the same.

    python -m benchmarks.step [--model=resnet18] [--batch=128] [--torch_python=PATH]

Two views of every image go through encoder and head; NT-Xent; SGD with momentum. Same
network, same precision, same number of threads. Every program is a process of its own,
told in turns to do a round of steps, so that a busy machine disturbs all alike; the
medians over rounds are compared. Prints a JSON line for each and a table.

PyTorch takes part where it is installed, in this interpreter or in `--torch_python`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

WIDTHS = {"resnet18": (64, 128, 256, 512), "resnet_small": (24, 48, 96)}
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet_small": (1, 1, 1)}
TEMPERATURE = 0.5
LEARNING_RATE = 0.03


def clj_step(args):
  """Returns a function that does one step and waits for it."""
  import jax
  import jax.numpy as jnp
  import optax
  from jax.sharding import AxisType, NamedSharding, PartitionSpec

  from clj import models, sharding

  # On CPU one device a core: XLA runs many convolutions on one thread of a device.
  jax.config.update("jax_num_cpu_devices", args.threads)
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  if args.model == "resnet18":
    encoder = models.image("resnet18", stem="cifar", dtype=args.dtype)
  else:
    encoder = models.image("resnet_small", stem="cifar", dtype=args.dtype)
  head = models.projector((WIDTHS[args.model][-1], 128))
  tx = optax.sgd(LEARNING_RATE, momentum=0.9)
  images = jax.random.uniform(jax.random.key(0), (2 * args.batch, 32, 32, 3))
  images = jax.device_put(images, rows)

  def init(rng, x):
    params1, stats1 = encoder.init(rng, x)
    y, _ = encoder.apply(params1, stats1, x, train=False)
    params2, stats2 = head.init(rng, y)
    return (params1, params2), (stats1, stats2)

  def loss_fn(params, stats, x):
    y, stats1 = encoder.apply(params[0], stats[0], x, train=True)
    z, stats2 = head.apply(params[1], stats[1], y, train=True)
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    n = z.shape[0]
    logits = z @ z.T / TEMPERATURE - 1e9 * jnp.eye(n)
    labels = (jnp.arange(n) + n // 2) % n
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (stats1, stats2)

  def start(rng, x):
    params, stats = init(rng, x)
    return params, stats, tx.init(params)

  def step(state, x):
    params, stats, opt_state = state
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, x)
    updates, opt_state = tx.update(grads, opt_state)
    return (optax.apply_updates(params, updates), stats, opt_state), loss

  state = jax.jit(start, out_shardings=whole)(jax.random.key(0), images)
  options = sharding.compiler_options(mesh)
  step = jax.jit(step, donate_argnums=0, out_shardings=whole, compiler_options=options)

  def run():
    nonlocal state
    state, loss = step(state, images)
    return float(loss)

  return run


def torch_step(args):
  """Returns a function that does one step and waits for it."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  torch.set_num_threads(args.threads)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cudnn.benchmark = True

  class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
      super().__init__()
      self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
      self.bn1 = nn.BatchNorm2d(outputs)
      self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
      self.bn2 = nn.BatchNorm2d(outputs)
      self.shortcut = nn.Identity()
      if stride != 1 or inputs != outputs:
        self.shortcut = nn.Sequential(
          nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x):
      y = F.relu(self.bn1(self.conv1(x)), inplace=True)
      return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)

  widths, depths = WIDTHS[args.model], DEPTHS[args.model]
  layers = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])]
  layers.append(nn.ReLU(inplace=True))
  inputs = widths[0]
  for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
    for j in range(depth):
      layers.append(Block(inputs, width, 2 if i > 0 and j == 0 else 1))
      inputs = width
  layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
  layers += [nn.Linear(inputs, inputs, bias=False), nn.BatchNorm1d(inputs), nn.ReLU()]
  layers += [nn.Linear(inputs, 128, bias=False), nn.BatchNorm1d(128)]
  model = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(
    model.parameters(), lr=LEARNING_RATE, momentum=0.9, foreach=True
  )
  images = torch.rand(2 * args.batch, 3, 32, 32, device=device)
  images = images.to(memory_format=torch.channels_last)
  n = 2 * args.batch
  labels = (torch.arange(n, device=device) + args.batch) % n
  mask = 1e9 * torch.eye(n, device=device)

  def run():
    bfloat16 = args.dtype == "bfloat16"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16):
      z = model(images)
    z = F.normalize(z.float())
    loss = F.cross_entropy(z @ z.T / TEMPERATURE - mask, labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()

  return run


def work(args):
  """A worker: for every line on stdin, times a round of steps and prints seconds."""
  start = time.perf_counter()
  step = {"clj": clj_step, "torch": torch_step}[args.worker](args)
  first = step()  # compiles
  step()
  print(json.dumps({"ready_s": time.perf_counter() - start, "loss": first}), flush=True)
  for _ in sys.stdin:
    times = []
    for _ in range(args.steps):
      start = time.perf_counter()
      step()
      times.append(time.perf_counter() - start)
    print(json.dumps(times), flush=True)


def has_torch(python):
  found = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
  return subprocess.run([python, "-c", found], check=False).returncode == 0


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--model", choices=sorted(WIDTHS), default="resnet18")
  parser.add_argument("--batch", type=int, default=128, help="images; twice the views")
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  parser.add_argument("--steps", type=int, default=2, help="steps a round")
  parser.add_argument("--rounds", type=int, default=4)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--torch_python", default=sys.executable)
  parser.add_argument("--worker", choices=["clj", "torch"], help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    work(args)
    return
  pythons = {"clj": sys.executable}
  if has_torch(args.torch_python):
    pythons["torch"] = args.torch_python
  else:
    print(f"no torch in {args.torch_python}: clj alone", file=sys.stderr)
  workers, times = {}, {name: [] for name in pythons}
  for name, python in pythons.items():
    workers[name] = subprocess.Popen(
      [python, "-m", "benchmarks.step", *sys.argv[1:], "--worker", name],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    json.loads(workers[name].stdout.readline())  # one compiles, then the other
  for _ in range(args.rounds):
    for name, worker in workers.items():
      worker.stdin.write("\n")
      worker.stdin.flush()
      times[name] += json.loads(worker.stdout.readline())
  for worker in workers.values():
    worker.stdin.close()
    worker.wait()
  rows = []
  for name in pythons:
    seconds = statistics.median(times[name])
    row = {
      "benchmark": "step",
      "program": name,
      "model": args.model,
      "batch": args.batch,
      "dtype": args.dtype,
      "machine": f"{platform.machine()}, {os.cpu_count()} cores",
      "step_s": round(seconds, 4),
      "images_per_s": round(args.batch / seconds, 1),
      "time_ratio_to_clj": round(seconds / statistics.median(times["clj"]), 3),
    }
    rows.append(row)
    print(json.dumps(row))
  print(f"\n{args.model}, {args.batch} images (two views each), {args.dtype}")
  print(f"{'program':10}{'s/step':>10}{'images/s':>12}{'time/clj':>12}")
  for row in rows:
    print(
      f"{row['program']:10}{row['step_s']:10.3f}{row['images_per_s']:12.1f}"
      f"{row['time_ratio_to_clj']:12.2f}"
    )


if __name__ == "__main__":
  main()
