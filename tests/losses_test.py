"""Every loss against a slow float64 twin, on 1 to 8 devices, and by its properties.

A case is a loss `(inputs, axis_name=None) -> scalar`, a twin in plain NumPy that reads
like the paper, and inputs. Gradients of the twins are directional differences.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clj import losses

B, D, K = 16, 6, 5


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def log_softmax(x):
  return np.log(softmax(x))


# Twins: float64, slow, obvious.


def barlow_twins_twin(z1, z2, lambd=0.0051, eps=1e-5, groups=1):
  def standardise(z):
    return np.concatenate(
      [
        (part - part.mean(0)) / np.sqrt(part.var(0) + eps)
        for part in np.split(z, groups)
      ]
    )

  c = standardise(z1).T @ standardise(z2) / len(z1)
  total = 0.0
  for i in range(len(c)):
    for j in range(len(c)):
      total += (c[i, j] - 1) ** 2 if i == j else lambd * c[i, j] ** 2
  return total


def vicreg_twin(x, y, sim=25.0, std=25.0, cov=1.0, gamma=1.0, eps=1e-4):
  def spread(z):
    return np.mean(np.maximum(0, gamma - np.sqrt(z.var(0, ddof=1) + eps)))

  def redundancy(z):
    c = np.cov(z.T)
    return sum(
      c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j
    ) / len(c)

  return (
    sim * np.mean((x - y) ** 2)
    + std * (spread(x) + spread(y)) / 2
    + cov * (redundancy(x) + redundancy(y))
  )


def koleo_twin(x, eps=1e-8, groups=1):
  total = 0.0
  for z in np.split(unit(x), groups):
    for i in range(len(z)):
      others = [j for j in range(len(z)) if j != i]
      nearest = min(others, key=lambda j: (np.sum((z[i] - z[j]) ** 2), j))
      total -= np.log(np.linalg.norm(z[i] - z[nearest] + eps) + eps)
  return total / len(x)


def byol_twin(prediction, target):
  cosine = np.sum(unit(prediction) * unit(target), axis=1)
  return np.mean(2 - 2 * cosine)


def sinkhorn_twin(scores, epsilon=0.05, iterations=3):
  q = np.exp(scores / epsilon)
  q /= q.sum()
  for _ in range(iterations):
    q /= q.sum(0, keepdims=True) * q.shape[1]
    q /= q.sum(1, keepdims=True) * q.shape[0]
  return q * len(q)


def swav_twin(scores, codes, temperature=0.1):
  terms = [
    np.mean(-np.sum(codes[:, g] * log_softmax(scores[:, v] / temperature), -1))
    for g in range(codes.shape[1])
    for v in range(scores.shape[1])
    if v != g
  ]
  return np.mean(terms)


def dino_v2_twin(student, target, temperature=0.1):
  return sum(
    np.mean(-np.sum(target[:, g] * log_softmax(student[:, v] / temperature), -1))
    for g in range(target.shape[1])
    for v in range(student.shape[1])
  )


def ibot_twin(student, target, mask, temperature=0.1):
  total = 0.0
  for s, t, m in zip(student, target, mask):
    entropies = [
      -np.sum(t[n] * log_softmax(s[n] / temperature)) for n in range(len(m)) if m[n]
    ]
    total += np.mean(entropies) if entropies else 0.0
  return total / len(student)


def gram_twin(student, teacher, level="image", negatives="keep"):
  s, t = unit(student), unit(teacher)
  if level == "batch":
    s, t = s.reshape(1, -1, s.shape[-1]), t.reshape(1, -1, t.shape[-1])
  total = []
  for a, b in zip(s, t):
    a, b = a @ a.T, b @ b.T
    if negatives != "keep":
      b = np.maximum(b, 0)
    if negatives == "clip":
      a = np.maximum(a, 0)
    total.append((a - b) ** 2)
  return np.mean(total)


def triplet_twin(anchor, positive, negative, margin=1.0, eps=1e-6):
  distance = lambda a, b: np.sqrt(np.sum((a - b) ** 2) + eps)
  return np.mean(
    [
      max(0, distance(a, p) - distance(a, n) + margin)
      for a, p, n in zip(anchor, positive, negative)
    ]
  )


def all_triplets(x, label):
  d = np.sqrt(np.sum((x[:, None] - x[None]) ** 2, -1))
  rows = range(len(x))
  return [
    (d[a, p], d[a, n])
    for a in rows
    for p in rows
    for n in rows
    if p != a and label[p] == label[a] and label[n] != label[a]
  ]


def triplet_batch_all_twin(x, label, margin, mining):
  mined = {
    "all": lambda p, n: n - p <= margin,
    "hard": lambda p, n: n <= p,
    "semihard": lambda p, n: p < n <= p + margin,
  }[mining]
  hinges = [max(0, p - n + margin) for p, n in all_triplets(x, label) if mined(p, n)]
  hinges = [h for h in hinges if h > 0]
  return np.mean(hinges) if hinges else 0.0


def triplet_batch_hard_twin(x, label, margin=1.0, soft=False):
  total = 0.0
  for a in range(len(x)):
    d = np.sqrt(np.sum((x[a] - x) ** 2, -1))
    same = label == label[a]
    difference = d[same].max() - d[~same].min()
    total += np.log1p(np.exp(difference)) if soft else max(0, margin + difference)
  return total / len(x)


def triplet_semihard_twin(x, label, margin=1.0):
  hinges = []
  for a in range(len(x)):
    d = np.sqrt(np.sum((x[a] - x) ** 2, -1))
    negatives = d[label != label[a]]
    for p in range(len(x)):
      if p != a and label[p] == label[a]:
        beyond = negatives[negatives > d[p]]
        negative = beyond.min() if len(beyond) else negatives.max()
        hinges.append(max(0, margin + d[p] - negative))
  return np.mean(hinges)


# Cases: inputs that are differentiated, loss, twin. Targets, labels and masks are
# closed over in the twin and part of `fixed` in the loss, which is sharded alike.

LABEL = (
  np.arange(B, dtype=np.int32) % 5
)  # 16 rows: one class has four, the others three
CODES = softmax(normal(7, B, 2, K))
MASK = np.random.default_rng(8).random((B, 4)) < 0.5
MASK[0] = False
PATCHES = softmax(normal(9, B, 4, K))
TEACHER = normal(10, B, 4, D)
TARGET = normal(11, B, D)

PAIR = {"z1": normal(0, B, D), "z2": normal(0, B, D) + 0.3 * normal(1, B, D)}
ONE = {"x": normal(2, B, D)}
CLOSE = {"x": normal(3, B, D)}  # with rows that coincide and nearly coincide
CLOSE["x"][9] = CLOSE["x"][2]  # of other labels and, on 2 and more, other devices
CLOSE["x"][14] = CLOSE["x"][6] + 1e-3
CLOSE["x"][5] = CLOSE["x"][12] + 1e-2

CASES = {}


def case(name, inputs, twin, fixed=None, axis=True):
  """Enters a loss `(axis_name=None, **inputs, **fixed)`; axis: it has such a form."""

  def enter(loss):
    CASES[name] = (loss, twin, inputs, fixed or {}, axis)
    return loss

  return enter


@case("barlow_twins", PAIR, lambda z1, z2: barlow_twins_twin(z1, z2))
def _(z1, z2, axis_name=None):
  return losses.barlow_twins(z1, z2, axis_name=axis_name)


@case(
  "barlow_twins_groups",
  PAIR,
  lambda z1, z2: barlow_twins_twin(z1, z2, 0.02, 1e-3, 2),
  axis=False,
)
def _(z1, z2):
  return losses.barlow_twins(z1, z2, 0.02, eps=1e-3, groups=2)


@case("vicreg", PAIR, lambda z1, z2: vicreg_twin(0.3 * z1, z2, 10, 5, 2))
def _(z1, z2, axis_name=None):
  return losses.vicreg(0.3 * z1, z2, 10, 5, 2, axis_name=axis_name)


@case("koleo", ONE, koleo_twin)
@case("koleo_ties", CLOSE, koleo_twin)
def _(x, axis_name=None):
  return losses.koleo(x, axis_name=axis_name)


@case("koleo_groups", ONE, lambda x: koleo_twin(x, groups=2), axis=False)
def _(x):
  return losses.koleo(x, groups=2)


@case(
  "byol", {"x": normal(4, B, D)}, lambda x: byol_twin(x, TARGET), {"target": TARGET}
)
def _(x, target, axis_name=None):
  return losses.byol(x, target)


# The codes are a target: no gradient; so they are compared with weights on them.
@case(
  "sinkhorn",
  {"x": normal(5, B, K)},
  lambda x: np.sum(np.tile(np.arange(K), (B, 1)) * sinkhorn_twin(STOPPED, 0.5) * x) / B,
  {"scores": (STOPPED := normal(6, B, K))},
)
def _(x, scores, axis_name=None):
  codes = losses.sinkhorn(scores, 0.5, axis_name=axis_name)
  return jnp.mean(jnp.sum(jnp.arange(K, dtype=jnp.float32)[None] * codes * x, axis=1))


SCORES = {"scores": np.tanh(normal(12, B, 3, K))}


@case(
  "swav",
  SCORES,
  lambda scores: swav_twin(
    scores,
    np.stack([sinkhorn_twin(SCORES["scores"][:, g].astype(float)) for g in (0, 1)], 1),
  ),
  {"stopped": SCORES["scores"]},
)
def _(scores, stopped, axis_name=None):
  codes = losses.swav_codes(stopped[:, :2], axis_name=axis_name)
  return losses.swav(scores, codes)


@case(
  "dino",
  {"student": normal(13, B, 3, K)},
  lambda student: swav_twin(student, CODES, 0.3) + dino_v2_twin(student, CODES, 0.2),
  {"target": CODES},
)
def _(student, target, axis_name=None):
  v1 = losses.dino(student, target, 0.3)
  return v1 + losses.dino(student, target, 0.2, pairs="v2")


@case(
  "ibot",
  {"student": normal(14, B, 4, K)},
  lambda student: ibot_twin(student, PATCHES, MASK),
  {"target": PATCHES, "mask": MASK},
)
def _(student, target, mask, axis_name=None):
  return losses.ibot(student, target, mask)


@case(
  "gram",
  {"student": normal(15, B, 4, D)},
  lambda student: (
    gram_twin(student, TEACHER)
    + gram_twin(student, TEACHER, negatives="clip")
    + gram_twin(student, TEACHER, negatives="clip_teacher")
  ),
  {"teacher": TEACHER},
)
def _(student, teacher, axis_name=None):
  return (
    losses.gram(student, teacher)
    + losses.gram(student, teacher, negatives="clip")
    + losses.gram(student, teacher, negatives="clip_teacher")
  )


@case(
  "gram_batch",
  {"student": normal(15, B, 4, D)},
  lambda student: gram_twin(student, TEACHER, "batch", "clip"),
  {"teacher": TEACHER},
  axis=False,
)
def _(student, teacher):
  return losses.gram(student, teacher, level="batch", negatives="clip")


@case(
  "triplet",
  {k: normal(s, B, D) for s, k in enumerate(("anchor", "positive", "negative"), 16)},
  triplet_twin,
)
def _(anchor, positive, negative, axis_name=None):
  return losses.triplet(anchor, positive, negative)


for _mining in ("all", "hard", "semihard"):

  @case(
    f"triplet_batch_all_{_mining}",
    CLOSE if _mining == "all" else ONE,
    lambda x, mining=_mining: triplet_batch_all_twin(x, LABEL, 0.4, mining),
    {"label": LABEL},
  )
  def _(x, label, axis_name=None, mining=_mining):
    return losses.triplet_batch_all(x, label, 0.4, mining=mining, axis_name=axis_name)


@case(
  "triplet_batch_hard",
  CLOSE,
  lambda x: triplet_batch_hard_twin(x, LABEL, 0.7),
  {"label": LABEL},
)
def _(x, label, axis_name=None):
  return losses.triplet_batch_hard(x, label, 0.7, axis_name=axis_name)


@case(
  "triplet_batch_hard_soft",
  ONE,
  lambda x: triplet_batch_hard_twin(x, LABEL, soft=True),
  {"label": LABEL},
)
def _(x, label, axis_name=None):
  return losses.triplet_batch_hard(x, label, soft=True, axis_name=axis_name)


@case(
  "triplet_semihard",
  CLOSE,
  lambda x: triplet_semihard_twin(x, LABEL, 0.7),
  {"label": LABEL},
)
def _(x, label, axis_name=None):
  return losses.triplet_semihard(x, label, 0.7, axis_name=axis_name)


# The tests over all cases.


def value_and_grad(loss, inputs, fixed):
  fn = jax.jit(jax.value_and_grad(lambda x, fixed: loss(**x, **fixed)))
  value, grad = fn(inputs, fixed)
  return float(value), {k: np.asarray(g, np.float64) for k, g in grad.items()}


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in tree.values()))


def minus(a, b):
  return {k: a[k] - b[k] for k in a}


@pytest.mark.parametrize("name", CASES)
def test_twin(name):
  loss, twin, inputs, fixed, _ = CASES[name]
  value, grad = value_and_grad(loss, inputs, fixed)
  exact = {k: x.astype(np.float64) for k, x in inputs.items()}
  want = twin(**exact)
  assert abs(value - want) <= 2e-6 * max(1, abs(want))
  rng, step = np.random.default_rng(0), 1e-6
  for _ in range(4):
    direction = {k: rng.normal(size=x.shape) for k, x in exact.items()}
    if inputs is CLOSE:
      # Rows that coincide stay together: a loss has a kink where they part.
      direction["x"][9] = direction["x"][2]
    there = twin(**{k: x + step * direction[k] for k, x in exact.items()})
    back = twin(**{k: x - step * direction[k] for k, x in exact.items()})
    slope = sum(np.sum(grad[k] * direction[k]) for k in grad)
    limit = 1e-5 * norm(grad) * norm(direction)
    assert abs(slope - (there - back) / (2 * step)) <= limit


@pytest.mark.parametrize("name", CASES)
def test_devices(name):
  """The same value and gradient on 1, 2, 4 and 8 devices."""
  loss, _, inputs, fixed, _ = CASES[name]
  want, want_grad = value_and_grad(loss, inputs, fixed)
  for count in (2, 4, 8):
    grid = np.array(jax.devices()[:count]).reshape(-1, 2)
    mesh = Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    put = lambda tree, rows=rows: jax.device_put(tree, rows)
    with jax.set_mesh(mesh):
      value, grad = value_and_grad(loss, put(inputs), put(fixed))
    assert abs(value - want) <= 1e-6 * max(1, abs(want)), count
    assert norm(minus(grad, want_grad)) <= 1e-5 * norm(want_grad), count


def local_forms():
  """`(name, fn)`: what each device computes in the ways that people write a step.

  `fn(step, params, batch)` gives the loss and its gradient by `params`, of `step(params,
  shard) -> this device's value`.
  """
  mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))

  def pmap(step, params, batch):
    def one(params, batch):
      value, grad = jax.value_and_grad(step)(params, batch)
      return lax.pmean((value, grad), "data")

    shards = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    results = jax.pmap(one, axis_name="data", in_axes=(None, 0))(params, shards)
    return jax.tree.map(lambda x: x[0], results)

  def inside(params, batch, step, check_vma):
    def one(params, batch):
      if check_vma:
        return jax.value_and_grad(lambda p: lax.pmean(step(p, batch), "data"))(params)
      value, grad = jax.value_and_grad(step)(params, batch)
      return lax.pmean((value, grad), "data")

    return jax.shard_map(
      one, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )(params, batch)

  def outside(params, batch, step, check_vma):
    values = jax.shard_map(
      lambda params, batch: step(params, batch)[None],
      mesh=mesh,
      in_specs=(P(), P("data")),
      out_specs=P("data"),
      check_vma=check_vma,
    )
    return jax.value_and_grad(lambda params: values(params, batch).mean())(params)

  yield "pmap", pmap
  for where in (inside, outside):
    for check_vma in (True, False):
      yield (
        f"shard_map {where.__name__} check_vma={check_vma}",
        lambda step, params, batch, where=where, check_vma=check_vma: jax.jit(
          lambda params, batch: where(params, batch, step, check_vma)
        )(params, batch),
      )


LOCAL = sorted(name for name, (*_, axis) in CASES.items() if axis)


@pytest.mark.parametrize("form", dict(local_forms()))
@pytest.mark.parametrize("name", LOCAL)
def test_axis_forms(name, form):
  """Local shards, with a parameter before the loss, against the dense gradient."""
  loss, _, inputs, fixed, _ = CASES[name]
  params = {k: jnp.eye(x.shape[-1]) + 0.1 for k, x in inputs.items()}

  def step(params, batch, **axis):
    embedded = {k: jnp.matmul(batch[0][k], w) for k, w in params.items()}
    return loss(**embedded, **batch[1], **axis)

  batch = jax.tree.map(jnp.asarray, (inputs, fixed))
  want, want_grad = jax.jit(jax.value_and_grad(step))(params, batch)
  value, grad = dict(local_forms())[form](
    lambda params, batch: step(params, batch, axis_name="data"), params, batch
  )
  assert abs(value - want) <= 1e-6 * max(1, abs(want))
  assert norm(minus(grad, want_grad)) <= 1e-5 * norm(want_grad)
