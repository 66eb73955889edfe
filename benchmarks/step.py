"""Speed of a train step on given inputs, beside PyTorch doing the same.

    python -m benchmarks.step [--model=resnet18] [--batch=128] [--torch_python=PATH]
    python -m benchmarks.step --model=vit_s16 --batch=8 [--forward] [--torch_python=..]
    python -m benchmarks.step --model=text_b --batch=32 [--forward]

ResNets take a step of SimCLR: two views of every image go through encoder and head;
NT-Xent; SGD with momentum. Transformers (images of 224 pixels, texts of 77 tokens) take
one of AdamW on the mean square of their features, or with --forward make these alone;
"flax" among their programs is clj without its forms for CPUs (`clj.models.dense`).

Same network, same precision, same number of threads. Every program is a process of its
own, told in turns to do a round of steps, so that a busy machine disturbs all alike;
the medians over rounds are compared, of the time by the clock and by the processor (of
all threads). Prints a JSON line for each and a table.

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
from functools import partial

WIDTHS = {"resnet18": (64, 128, 256, 512), "resnet_small": (24, 48, 96)}
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet_small": (1, 1, 1)}
TRANSFORMERS = ("vit_s16", "text_b")
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
  jax.config.update("jax_num_cpu_devices", args.devices)
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


def clj_transformer(args):
  """Returns a function that does one step, or forward pass, and waits for it."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from clj import models, sharding
  from clj.models import dense

  if args.worker == "flax":
    dense.on_cpu = lambda dtype: False
  jax.config.update("jax_num_cpu_devices", args.devices)
  mesh = sharding.make_mesh()
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  if args.model == "text_b":
    network = models.text("clip_vit_b32", dtype=args.dtype)
    text = np.random.default_rng(0).integers(1, 49407, (args.batch, 77), np.int32)
    inputs = text, np.ones(text.shape, bool)
  else:
    network = models.image("vit_s16", dtype=args.dtype)
    inputs = (np.full((args.batch, 224, 224, 3), 0.5, np.float32),)
  inputs = jax.device_put(inputs, rows)
  tx = optax.adamw(1e-4, weight_decay=0.05)

  def start(rng, *inputs):
    params, _ = network.init(rng, *inputs)
    return params, tx.init(params)

  def loss_fn(params, *inputs):
    y, _ = network.apply(params, {}, *inputs, train=not args.forward)
    return jnp.square(y).mean()

  def step(state, *inputs):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, *inputs)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  state = jax.jit(start, out_shardings=whole)(jax.random.key(0), *inputs)
  options = sharding.compiler_options(mesh)
  compile = partial(jax.jit, out_shardings=whole, compiler_options=options)
  forward, step = compile(loss_fn), compile(step, donate_argnums=0)

  def run():
    nonlocal state
    if args.forward:
      return float(forward(state[0], *inputs))
    state, loss = step(state, *inputs)
    return float(loss)

  return run


def torch_transformer(args):
  """timm's vit_small_patch16_224 without its classifier, written out."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  torch.set_num_threads(args.threads)
  width, heads = 384, 6

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
      self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
      self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
      n, tokens, _ = x.shape
      qkv = self.qkv(self.norm1(x)).view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
      y = F.scaled_dot_product_attention(*qkv.unbind()).transpose(1, 2)
      x = x + self.out(y.reshape(n, tokens, width))
      return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

  class ViT(nn.Module):
    def __init__(self):
      super().__init__()
      self.patch = nn.Conv2d(3, width, 16, 16)
      self.cls = nn.Parameter(torch.zeros(1, 1, width))
      self.position = nn.Parameter(0.02 * torch.randn(1, 197, width))
      self.layers = nn.Sequential(*[Block() for _ in range(12)])
      self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x):
      x = self.patch(x).flatten(2).transpose(1, 2)
      x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
      return self.norm(self.layers(x))[:, 0]

  model = ViT()
  optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05)
  images = torch.full((args.batch, 3, 224, 224), 0.5)

  def run():
    bfloat16 = args.dtype == "bfloat16"
    with (
      torch.set_grad_enabled(not args.forward),
      torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16),
    ):
      loss = model(images).float().square().mean()
    if not args.forward:
      optimizer.zero_grad(set_to_none=True)
      loss.backward()
      optimizer.step()
    return loss.item()

  return run


def work(args):
  """A worker: for every line on stdin, times a round of steps and prints seconds."""
  start = time.perf_counter()
  ours, theirs = clj_step, torch_step
  if args.model in TRANSFORMERS:
    ours, theirs = clj_transformer, torch_transformer
  step = (theirs if args.worker == "torch" else ours)(args)
  first = step()  # compiles
  step()
  print(json.dumps({"ready_s": time.perf_counter() - start, "loss": first}), flush=True)
  for _ in sys.stdin:
    times = []
    for _ in range(args.steps):
      start, used = time.perf_counter(), time.process_time()
      step()
      times.append((time.perf_counter() - start, time.process_time() - used))
    print(json.dumps(times), flush=True)


def has_torch(python):
  found = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
  return subprocess.run([python, "-c", found], check=False).returncode == 0


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--model", choices=[*WIDTHS, *TRANSFORMERS], default="resnet18")
  parser.add_argument("--batch", type=int, default=128, help="images or texts")
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  parser.add_argument("--steps", type=int, default=2, help="steps a round")
  parser.add_argument("--rounds", type=int, default=4)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--devices", type=int, default=os.cpu_count(), help="of the CPU")
  parser.add_argument("--forward", action="store_true", help="no gradients, no update")
  parser.add_argument("--torch_python", default=sys.executable)
  parser.add_argument(
    "--worker", choices=["clj", "flax", "torch"], help=argparse.SUPPRESS
  )
  args = parser.parse_args()
  if args.worker:
    work(args)
    return
  pythons = {"clj": sys.executable}
  if args.model in TRANSFORMERS:
    pythons["flax"] = sys.executable
  if args.model == "text_b":
    print("the text tower is not written for torch", file=sys.stderr)
  elif has_torch(args.torch_python):
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
  medians = {
    name: [statistics.median(t) for t in zip(*times[name])] for name in pythons
  }
  for name, (seconds, processor) in medians.items():
    row = {
      "benchmark": "step",
      "program": name,
      "model": args.model,
      "batch": args.batch,
      "dtype": args.dtype,
      "machine": f"{platform.machine()}, {os.cpu_count()} cores",
      "step_s": round(seconds, 4),
      "processor_s": round(processor, 4),
      "images_per_s": round(args.batch / seconds, 1),
      "time_ratio_to_clj": round(seconds / medians["clj"][0], 3),
    }
    rows.append(row)
    print(json.dumps(row))
  inputs = {"text_b": "texts", "vit_s16": "images"}.get(args.model)
  inputs = inputs or "images (two views each)"
  what = ", forward" if args.forward else ""
  print(f"\n{args.model}, {args.batch} {inputs}, {args.dtype}{what}")
  print(
    f"{'program':10}{'s/step':>10}{'processor':>12}{'images/s':>12}{'time/clj':>12}"
  )
  for row in rows:
    print(
      f"{row['program']:10}{row['step_s']:10.3f}{row['processor_s']:12.3f}{row['images_per_s']:12.1f}"
      f"{row['time_ratio_to_clj']:12.2f}"
    )


if __name__ == "__main__":
  main()
