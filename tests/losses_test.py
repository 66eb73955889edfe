"""Every loss against a slow float64 twin, on 1 to 8 devices, and by its properties.

A case is a loss, a twin in plain NumPy that reads like the paper, and inputs. All cases
are one program on one device, one on each mesh and one in each form of a local step:
each has inputs of its own, so that the gradient of their sum is that of each.
"""

import functools
import inspect
import subprocess
import sys
from typing import Any, NamedTuple

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


def cross_entropy(logits, positive):
  """Of one row; `positive` is the place of the right column among its logits."""
  return -log_softmax(np.asarray(logits))[positive]


def moco_twin(query, key, queue, temperature):
  rows = [
    cross_entropy(np.concatenate([[q @ k], queue @ q]) / temperature, 0)
    for q, k in zip(unit(query), unit(key))
  ]
  return np.mean(rows)


def one_way_twin(query, key, temperature):
  """The mean cross-entropy of each query's own among all keys."""
  return np.mean([cross_entropy(key @ q / temperature, i) for i, q in enumerate(query)])


def moco_v3_twin(q1, q2, k1, k2, temperature):
  contrast = lambda q, k: one_way_twin(unit(q), unit(k), temperature)
  return 2 * temperature * (contrast(q1, k2) + contrast(q2, k1))


def simcse_twin(z1, z2, z3, temperature, weight):
  z1, z2, z3 = unit(z1), unit(z2), unit(z3)
  rows = []
  for i, z in enumerate(z1):
    hard = z3 @ z / temperature
    hard[i] += weight
    rows.append(cross_entropy(np.concatenate([z2 @ z / temperature, hard]), i))
  return np.mean(rows)


def dense_retrieval_twin(query, passage, ids=None):
  stride, rows = len(passage) // len(query), []
  ids = np.arange(len(passage)) if ids is None else ids
  for i, q in enumerate(query):
    own = i * stride
    kept = [j for j in range(len(passage)) if j == own or ids[j] != ids[own]]
    rows.append(cross_entropy(passage[kept] @ q, kept.index(own)))
  return np.mean(rows)


def supcon_twin(z, label, temperature, base_temperature):
  rows = []
  for i in range(len(z)):
    others = [j for j in range(len(z)) if j != i]
    positives = [n for n, j in enumerate(others) if label[j] == label[i]]
    log_p = log_softmax(z[others] @ z[i] / temperature)
    rows.append(-np.mean(log_p[positives]) if positives else 0.0)
  return temperature / base_temperature * np.mean(rows)


def nt_xent_labels_twin(x, label, temperature):
  z, pairs = unit(x), []
  for i in range(len(z)):
    negatives = z[label != label[i]] @ z[i] / temperature
    for j in range(len(z)):
      if j != i and label[j] == label[i]:
        positive = z[j] @ z[i] / temperature
        pairs.append(cross_entropy(np.concatenate([[positive], negatives]), 0))
  return np.mean(pairs)


def audioclip_twin(audio, image, text, *log_scales):
  total = 0.0
  pairs = ((audio, image), (audio, text), (image, text))
  for (a, b), log_scale in zip(pairs, log_scales):
    t = 1 / np.clip(np.exp(log_scale), 1, 100)
    a, b = unit(a), unit(b)
    total += one_way_twin(a, b, t) + one_way_twin(b, a, t)
  return total / 6


def clip_distill_twin(image, text, teacher_image, teacher_text, scale, teacher_scale):
  student = scale * image @ text.T
  teacher = teacher_scale * teacher_image @ teacher_text.T
  one_way = lambda t, s: np.mean(-np.sum(softmax(t) * log_softmax(s), axis=1))
  return (one_way(teacher, student) + one_way(teacher.T, student.T)) / 2


def cpc_twin(context, encoded, predictors, temperature, negatives=None):
  rows = []
  batch, window = len(context), context.shape[1] - len(predictors)
  for k, w in enumerate(predictors):
    moments = [(b, t) for b in range(batch) for t in range(window)]
    for b, t in moments:
      predicted, own = w @ context[b, t], encoded[b, t + k + 1]
      if negatives is None:
        drawn = [encoded[c, u + k + 1] for c, u in moments if (c, u) != (b, t)]
      else:
        drawn = [encoded[c, u] for c, u in zip(*(n[b, :, t] for n in negatives))]
      scores = np.array([own, *drawn]) @ predicted / temperature
      rows.append(cross_entropy(scores, 0))
  return np.mean(rows)


def bpr_twin(user, positive, negative):
  difference = np.sum(user * negative, 1) - np.sum(user * positive, 1)
  return np.mean(np.log1p(np.exp(difference)))


def sgl_twin(view1, view2, index, temperature):
  view1, view2 = unit(view1), unit(view2)
  return sum(cross_entropy(view2 @ view1[i] / temperature, i) for i in index)


def sampled_softmax_twin(
  query, item, more, q, more_q, ids, more_ids, temperature, correct, hard, weights
):
  items, q = np.concatenate([item, more]), np.concatenate([q, more_q])
  ids, rows = np.concatenate([ids, more_ids]), []
  for i, row in enumerate(query):
    logits = items @ row / temperature - np.log(np.clip(q, 1e-6, 1))
    if not correct:
      logits[i] += np.log(np.clip(q[i], 1e-6, 1))
    negatives = np.sort(logits[ids != ids[i]])[::-1][:hard]
    rows.append(cross_entropy(np.concatenate([logits[i : i + 1], negatives]), 0))
  return np.sum(weights * rows) / np.sum(weights)


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
CLOSE["x"][14] = CLOSE["x"][6] + 1e-2
CLOSE["x"][5] = CLOSE["x"][12] + 3e-2


class Case(NamedTuple):
  loss: Any  # `(**inputs, **fixed) -> scalar`
  twin: Any  # `(**inputs) -> scalar`
  inputs: dict  # what is differentiated
  fixed: dict  # sharded like the inputs, not differentiated
  axis: bool  # the loss takes `axis_name` too


CASES = {}


def case(name, inputs, twin, fixed=None, axis=False):
  def enter(loss):
    CASES[name] = Case(loss, twin, inputs, fixed or {}, axis)
    return loss

  return enter


@case("barlow_twins", PAIR, lambda z1, z2: barlow_twins_twin(z1, z2), axis=True)
def _(z1, z2, axis_name=None):
  return losses.barlow_twins(z1, z2, axis_name=axis_name)


@case(
  "barlow_twins_groups",
  PAIR,
  lambda z1, z2: barlow_twins_twin(z1, z2, 0.02, 1e-3, 2),
)
def _(z1, z2):
  return losses.barlow_twins(z1, z2, 0.02, eps=1e-3, groups=2)


@case("vicreg", PAIR, lambda z1, z2: vicreg_twin(0.3 * z1, z2, 10, 5, 2), axis=True)
def _(z1, z2, axis_name=None):
  return losses.vicreg(0.3 * z1, z2, 10, 5, 2, axis_name=axis_name)


@case("koleo", ONE, koleo_twin)
@case("koleo_ties", CLOSE, koleo_twin, axis=True)
def _(x, axis_name=None):
  return losses.koleo(x, axis_name=axis_name)


@case("koleo_groups", ONE, lambda x: koleo_twin(x, groups=2))
def _(x):
  return losses.koleo(x, groups=2)


@case(
  "byol", {"x": normal(4, B, D)}, lambda x: byol_twin(x, TARGET), {"target": TARGET}
)
def _(x, target):
  return losses.byol(x, target)


# The codes are a target: no gradient; so they are compared with weights on them.
@case(
  "sinkhorn",
  {"x": normal(5, B, K)},
  lambda x: np.sum(np.tile(np.arange(K), (B, 1)) * sinkhorn_twin(STOPPED, 0.5) * x) / B,
  {"scores": (STOPPED := normal(6, B, K))},
  axis=True,
)
def _(x, scores, axis_name=None):
  codes = losses.sinkhorn(scores, 0.5, axis_name=axis_name)
  return jnp.mean(jnp.sum(jnp.arange(K, dtype=jnp.float32)[None] * codes * x, axis=1))


@case(
  "update_center",
  {"x": normal(71, B, K)},
  lambda x: np.mean(x @ (0.7 * np.arange(K) + 0.3 * STOPPED.mean(0))),
  {"teacher": STOPPED},
  axis=True,
)
def _(x, teacher, axis_name=None):
  center = jnp.arange(K, dtype=jnp.float32)
  new = losses.update_center(center, teacher, 0.7, axis_name=axis_name)
  return jnp.mean(jnp.sum(x * new[None], axis=1))


SCORES = {"scores": np.tanh(normal(12, B, 3, K))}


@case(
  "swav",
  SCORES,
  lambda scores: swav_twin(
    scores,
    np.stack([sinkhorn_twin(SCORES["scores"][:, g].astype(float)) for g in (0, 1)], 1),
  ),
  {"stopped": SCORES["scores"]},
  axis=True,
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
def _(student, target):
  v1 = losses.dino(student, target, 0.3)
  return v1 + losses.dino(student, target, 0.2, pairs="v2")


@case(
  "ibot",
  {"student": normal(14, B, 4, K)},
  lambda student: ibot_twin(student, PATCHES, MASK),
  {"target": PATCHES, "mask": MASK},
)
def _(student, target, mask):
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
  axis=True,
)
def _(student, teacher, axis_name=None):
  gram = functools.partial(losses.gram, student, teacher, axis_name=axis_name)
  return gram() + gram(negatives="clip") + gram(negatives="clip_teacher")


@case(
  "gram_batch",
  {"student": normal(15, B, 4, D)},
  lambda student: gram_twin(student, TEACHER, "batch", "clip"),
  {"teacher": TEACHER},
  axis=True,
)
def _(student, teacher, axis_name=None):
  return losses.gram(
    student, teacher, level="batch", negatives="clip", axis_name=axis_name
  )


@case(
  "triplet",
  {k: normal(s, B, D) for s, k in enumerate(("anchor", "positive", "negative"), 16)},
  triplet_twin,
)
def _(anchor, positive, negative):
  return losses.triplet(anchor, positive, negative)


for _mining in ("all", "hard", "semihard"):

  @case(
    f"triplet_batch_all_{_mining}",
    CLOSE if _mining == "all" else ONE,
    lambda x, mining=_mining: triplet_batch_all_twin(x, LABEL, 0.4, mining),
    {"label": LABEL},
    axis=_mining == "all",
  )
  def _(x, label, axis_name=None, mining=_mining):
    return losses.triplet_batch_all(x, label, 0.4, mining=mining, axis_name=axis_name)


@case(
  "triplet_batch_hard",
  CLOSE,
  lambda x: triplet_batch_hard_twin(x, LABEL, 0.7),
  {"label": LABEL},
  axis=True,
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
  axis=True,
)
def _(x, label, axis_name=None):
  return losses.triplet_semihard(x, label, 0.7, axis_name=axis_name)


TRIPLE = {k: normal(s, B, D) for s, k in enumerate(("audio", "image", "text"), 20)}
PAIRED = {"image": unit(TRIPLE["image"]), "text": unit(TRIPLE["text"])}
TEACHERS = {k: unit(normal(23 + i, B, 4)) for i, k in enumerate(("t_image", "t_text"))}
QUEUE = unit(normal(25, 24, D))
PASSAGE = normal(26, 2 * B, D)
PASSAGE_IDS = np.arange(2 * B, dtype=np.int32) % 29  # three passages come twice
SEQUENCES = {
  "context": normal(27, B, 5, 4),
  "encoded": normal(28, B, 5, 3),
  "predictors": normal(29, 2, 3, 4),
}
DRAWN = tuple(
  np.random.default_rng(30 + i).integers(0, n, (B, 4, 3)) for i, n in enumerate((B, 5))
)
NODES = {"view1": normal(32, 24, D), "view2": normal(33, 24, D)}
INDEX = np.random.default_rng(34).integers(0, 24, B).astype(np.int32)
TOWERS = {"query": normal(35, B, D), "item": normal(36, B, D), "more": normal(37, B, D)}
SAMPLED = {
  "q": np.random.default_rng(38).random(B).astype(np.float32),
  "more_q": np.random.default_rng(39).random(B).astype(np.float32),
  "ids": np.arange(B, dtype=np.int32) % 13,
  "more_ids": np.arange(B, dtype=np.int32) + 5,
  "weights": np.random.default_rng(40).random(B).astype(np.float32),
}


@case(
  "moco",
  {"query": normal(41, B, D)},
  lambda query: moco_twin(query, TARGET, QUEUE, 0.2),
  {"key": TARGET, "queue": QUEUE},
)
@case(
  "moco_replicated",  # rows stand alone: any step of one's own will do
  {"query": normal(41, B, D)},
  lambda query: moco_twin(query, TARGET, QUEUE, 0.2),
  {"key": TARGET},
  axis=True,
)
def _(query, key, queue=QUEUE, axis_name=None):
  return losses.moco(query, key, queue, 0.2)


@case(
  "moco_v3",
  {"q1": normal(42, B, D), "q2": normal(43, B, D)},
  lambda q1, q2: moco_v3_twin(q1, q2, TARGET, TARGET[::-1], 0.3),
  {"k1": TARGET, "k2": TARGET[::-1]},
  axis=True,
)
def _(q1, q2, k1, k2, axis_name=None):
  return losses.moco_v3(q1, q2, k1, k2, 0.3, axis_name=axis_name)


@case(
  "simcse",
  {"z1": normal(44, B, D), "z2": normal(45, B, D), "z3": normal(46, B, D)},
  lambda z1, z2, z3: (
    one_way_twin(unit(z1), unit(z2), 0.1) + simcse_twin(z1, z2, z3, 0.2, -0.7)
  ),
  axis=True,
)
def _(z1, z2, z3, axis_name=None):
  unsupervised = losses.simcse(z1, z2, 0.1, axis_name=axis_name)
  return unsupervised + losses.simcse(
    z1, z2, 0.2, negative=z3, negative_weight=-0.7, axis_name=axis_name
  )


@case(
  "dense_retrieval",
  {"query": normal(47, B, D), "passage": PASSAGE},
  lambda query, passage: (
    dense_retrieval_twin(query, passage)
    + dense_retrieval_twin(query, passage, PASSAGE_IDS)
  ),
  {"ids": PASSAGE_IDS},
  axis=True,
)
def _(query, passage, ids, axis_name=None):
  plain = losses.dense_retrieval(query, passage, axis_name=axis_name)
  return plain + losses.dense_retrieval(query, passage, ids=ids, axis_name=axis_name)


@case(
  "supcon",
  {"z": unit(normal(48, B, D))},
  lambda z: supcon_twin(z, LABEL, 0.2, 0.07),
  {"label": LABEL},
)
@case(
  "supcon_alone",  # a row without a positive, labels that are no small numbers
  {"z": unit(normal(48, B, D))},
  lambda z: supcon_twin(z, LONELY, 0.2, 0.07),
  {"label": (LONELY := np.where(np.arange(B) == 6, -9, 7 ** (LABEL + 1)).astype("i4"))},
  axis=True,
)
def _(z, label, axis_name=None):
  return losses.supcon(z, label, 0.2, base_temperature=0.07, axis_name=axis_name)


@case(
  "nt_xent_labels",
  {"x": normal(49, B, D)},
  lambda x: nt_xent_labels_twin(x, LABEL, 0.2),
  {"label": LABEL},
  axis=True,
)
def _(x, label, axis_name=None):
  return losses.nt_xent_labels(x, label, 0.2, axis_name=axis_name)


@case(
  "audioclip",
  {**TRIPLE, "s1": np.float32(1.0), "s2": np.float32(2.0), "s3": np.float32(0.5)},
  lambda audio, image, text, s1, s2, s3: audioclip_twin(audio, image, text, s1, s2, s3),
  axis=True,
)
def _(audio, image, text, s1, s2, s3, axis_name=None):
  return losses.audioclip(audio, image, text, s1, s2, s3, axis_name=axis_name)


@case(
  "clip_distill",
  {**PAIRED, "scale": np.float32(7.0)},
  lambda image, text, scale: clip_distill_twin(
    image, text, *TEACHERS.values(), scale, 11.0
  ),
  TEACHERS,
  axis=True,
)
def _(image, text, scale, t_image, t_text, axis_name=None):
  return losses.clip_distill(
    image, text, t_image, t_text, scale, 11.0, axis_name=axis_name
  )


@case("cpc", SEQUENCES, lambda **x: cpc_twin(**x, temperature=1.5), axis=True)
def _(axis_name=None, **sequences):
  return losses.cpc(**sequences, temperature=1.5, axis_name=axis_name)


@case(
  "cpc_drawn",
  SEQUENCES,
  lambda **x: cpc_twin(**x, temperature=1.5, negatives=DRAWN),
  {"row": DRAWN[0], "time": DRAWN[1]},
  axis=True,
)
def _(row, time, axis_name=None, **sequences):
  return losses.cpc(
    **sequences, temperature=1.5, negatives=(row, time), axis_name=axis_name
  )


@case(
  "bpr",
  {k: normal(s, B, D) for s, k in enumerate(("user", "positive", "negative"), 50)},
  bpr_twin,
)
def _(user, positive, negative):
  return losses.bpr(user, positive, negative)


@case(
  "sgl",
  NODES,
  lambda view1, view2: sgl_twin(view1, view2, INDEX, 0.3),
  {"index": INDEX},
  axis=True,
)
def _(view1, view2, index, axis_name=None):
  return losses.sgl(view1, view2, index, 0.3, axis_name=axis_name)


for _correct, _hard in ((True, None), (False, None), (True, 5)):

  @case(
    f"sampled_softmax_{_correct}_{_hard}",
    TOWERS,
    lambda correct=_correct, hard=_hard, **x: sampled_softmax_twin(
      **x, **SAMPLED, temperature=1.7, correct=correct, hard=hard
    ),
    SAMPLED,
    axis=_correct,
  )
  def _(query, item, more, correct=_correct, hard=_hard, axis_name=None, **fixed):
    return losses.sampled_softmax(
      query,
      item,
      1.7,
      probability=fixed["q"],
      correct_positive=correct,
      ids=fixed["ids"],
      negatives=more,
      negative_probability=fixed["more_q"],
      negative_ids=fixed["more_ids"],
      hard_negatives=hard,
      weights=fixed["weights"],
      axis_name=axis_name,
    )


# The tests over all cases.

INPUTS = {name: case.inputs for name, case in CASES.items()}
FIXED = {name: case.fixed for name, case in CASES.items()}
AXIS = [name for name, case in CASES.items() if case.axis]
# What is coupled by statistics, neighbours and mining: compared on 2 and 4 devices too.
COUPLED = ["barlow_twins", "vicreg", "koleo_ties", "sinkhorn", "swav"]
COUPLED += ["triplet_batch_all_all", "triplet_batch_hard"]
OTHERS = [name for name in CASES if name not in COUPLED]


def together(inputs, fixed):
  values = {name: CASES[name].loss(**inputs[name], **fixed[name]) for name in inputs}
  return sum(values.values()), values


VALUE_AND_GRAD = jax.jit(jax.value_and_grad(together, has_aux=True))


def run(inputs, fixed):
  """Value and gradient of every case."""
  (_, values), grads = VALUE_AND_GRAD(inputs, fixed)
  return jax.tree.map(lambda x: np.asarray(x, np.float64), (values, grads))


@functools.cache
def dense():
  return run(INPUTS, FIXED)


@functools.cache
def on_mesh(count, every):
  cases = CASES if every else COUPLED
  grid = np.array(jax.devices()[:count]).reshape(-1, 2)
  mesh = Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

  def put(x):
    split = np.ndim(x) and len(x) % count == 0
    return jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp")) if split else P()))

  with jax.set_mesh(mesh):
    chosen = [{name: of[name] for name in cases} for of in (INPUTS, FIXED)]
    return run(*jax.tree.map(put, chosen))


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


def check(value, want, grad, want_grad):
  assert abs(value - want) <= 1e-6 * max(1, abs(want))
  difference = jax.tree.map(np.subtract, grad, want_grad)
  assert norm(difference) <= 1e-5 * norm(want_grad)


@pytest.mark.parametrize("name", CASES)
def test_twin(name):
  values, grads = dense()
  value, grad, twin = values[name], grads[name], CASES[name].twin
  exact = {k: x.astype(np.float64) for k, x in INPUTS[name].items()}
  want = twin(**exact)
  assert abs(value - want) <= 2e-6 * max(1, abs(want))
  rng, step = np.random.default_rng(0), 1e-6
  for _ in range(4):
    direction = {k: rng.normal(size=x.shape) for k, x in exact.items()}
    if INPUTS[name] is CLOSE:
      # Rows that coincide stay together: a loss has a kink where they part.
      direction["x"][9] = direction["x"][2]
    there = twin(**{k: x + step * direction[k] for k, x in exact.items()})
    back = twin(**{k: x - step * direction[k] for k, x in exact.items()})
    slope = sum(np.sum(grad[k] * direction[k]) for k in grad)
    limit = 1e-5 * norm(grad) * norm(direction)
    assert abs(slope - (there - back) / (2 * step)) <= limit


def compare_devices(name, count, every):
  """The value and gradient of one device, on more."""
  (want, want_grad), (value, grad) = dense(), on_mesh(count, every)
  check(value[name], want[name], grad[name], want_grad[name])


@pytest.mark.parametrize("name", CASES)
def test_8_devices(name):
  compare_devices(name, 8, every=True)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", COUPLED)
def test_devices(name, count):
  compare_devices(name, count, every=False)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", OTHERS)
def test_devices_others(name, count):
  compare_devices(name, count, every=True)


# People's own steps: the loss of local shards, with parameters before it. Each form
# gives the mean over devices of `step(params, shard) -> (sum, aux)`, and its gradient.

MESH = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))


def pmap(step, params, batch):
  def one(params, batch):
    return lax.pmean(jax.value_and_grad(step, has_aux=True)(params, batch), "data")

  shards = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
  results = jax.pmap(one, axis_name="data", in_axes=(None, 0))(params, shards)
  return jax.tree.map(lambda x: x[0], results)


def inside(step, params, batch, check_vma):
  def one(params, batch):
    if check_vma:
      mean = lambda params: lax.pmean(step(params, batch), "data")
      return jax.value_and_grad(mean, has_aux=True)(params)
    return lax.pmean(jax.value_and_grad(step, has_aux=True)(params, batch), "data")

  fn = jax.shard_map(
    one, mesh=MESH, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
  )
  return jax.jit(fn)(params, batch)


def outside(step, params, batch, check_vma):
  rows = jax.shard_map(
    lambda *args: jax.tree.map(lambda x: x[None], step(*args)),
    mesh=MESH,
    in_specs=(P(), P("data")),
    out_specs=P("data"),
    check_vma=check_vma,
  )
  mean = lambda *args: jax.tree.map(jnp.mean, rows(*args))
  return jax.jit(jax.value_and_grad(mean, has_aux=True))(params, batch)


FORMS = {
  "pmap": pmap,
  "inside": functools.partial(inside, check_vma=False),
  "inside_vma": functools.partial(inside, check_vma=True),
  "outside": functools.partial(outside, check_vma=False),
  "outside_vma": functools.partial(outside, check_vma=True),
}


MORE = [
  pytest.param(form, marks=pytest.mark.slow)
  for form in ("inside", "outside", "outside_vma")
]


@functools.cache
def by_step(form):
  """Value and gradient by parameters before the loss; "dense": of the whole batch."""

  def step(params, batch, **axis):
    inputs, fixed = batch
    values = {}
    for name in AXIS:
      given = {}
      for k, w in params[name].items():
        given[k] = jnp.matmul(inputs[name][k], w) if k in inputs[name] else w
      values[name] = CASES[name].loss(**given, **fixed[name], **axis)
    return sum(values.values()), values

  splits = lambda x: np.ndim(x) and len(x) % 8 == 0  # not scales, predictors

  def parameter(x):
    return jnp.eye(x.shape[-1]) + 0.1 if splits(x) else jnp.asarray(x)

  inputs = {name: INPUTS[name] for name in AXIS}
  params = jax.tree.map(parameter, inputs)
  rows = {
    name: {k: x for k, x in given.items() if splits(x)}
    for name, given in inputs.items()
  }
  batch = rows, {name: FIXED[name] for name in AXIS}
  if form == "dense":
    fn = jax.jit(jax.value_and_grad(step, has_aux=True))
    (_, values), grads = fn(params, batch)
  else:
    local = functools.partial(step, axis_name="data")
    (_, values), grads = FORMS[form](local, params, batch)
  return jax.tree.map(lambda x: np.asarray(x, np.float64), (values, grads))


@pytest.mark.parametrize("form", ["pmap", "inside_vma", *MORE])
@pytest.mark.parametrize("name", AXIS)
def test_axis_name(name, form):
  """The mean over local values, and its gradient, are those of the whole batch."""
  (want, want_grad), (value, grad) = by_step("dense"), by_step(form)
  check(value[name], want[name], grad[name], want_grad[name])


# Those of no use to a batch on several devices: rows that stand alone, and helpers.
ALONE = """
bpr byol center_target dino encode_in_chunks enqueue ibot ibot_tokens l2_normalize
l2_penalty masked_weights moco push swav triplet
"""


def test_what_couples_the_batch_takes_axis_name():
  public = {k: f for k, f in vars(losses).items() if inspect.isfunction(f)}
  parameters = lambda f: inspect.signature(f).parameters
  takes = {k for k, f in public.items() if "axis_name" in parameters(f)}
  assert set(public) - takes == set(ALONE.split())
  # The others are in `softmax_losses_test.py`.
  longest = lambda name: max((k for k in public if name.startswith(k)), key=len)
  tested = {longest(name) for name in AXIS}
  elsewhere = {"clip", "info_nce", "nt_xent", "siglip"}
  indirect = {"swav_codes", "vicreg_terms"}
  assert takes - tested == elsewhere | indirect


# Properties.

ORDERED = {"barlow_twins_groups", "koleo_groups", "dense_retrieval", "cpc_drawn"}


def test_permutation():
  """The order of the batch does not matter."""
  order = np.random.default_rng(0).permutation(B)
  permute = lambda x: x[order] if np.ndim(x) and len(x) == B else x
  values, _ = run(*jax.tree.map(permute, (INPUTS, FIXED)))
  for name in set(CASES) - ORDERED:
    assert values[name] == pytest.approx(dense()[0][name], rel=2e-6), name


NORMALISED = """
byol koleo gram moco moco_v3 simcse sgl audioclip nt_xent_labels
"""
GIVEN = """
vicreg triplet triplet_batch_hard triplet_semihard dense_retrieval supcon cpc bpr swav
dino ibot clip_distill sampled_softmax_True_None
"""


def test_who_normalises():
  """Three times the embeddings: the same loss exactly where the loss normalises."""
  triple = lambda x: 3 * x if np.ndim(x) else x
  values, _ = run(jax.tree.map(triple, INPUTS), FIXED)
  for name in NORMALISED.split():
    assert values[name] == pytest.approx(dense()[0][name], rel=1e-5), name
  for name in GIVEN.split():
    assert abs(values[name] - dense()[0][name]) > 1e-2, name


def test_identical_embeddings():
  """Uniform logits are the logarithm of the number of candidates."""
  z = jnp.broadcast_to(unit(normal(60, 1, D)), (B, D))
  number = jnp.arange(B)
  many = jnp.concatenate([z, z])
  label = number % 4
  found = jax.jit(
    lambda: {
      "info_nce": (losses.info_nce(z, z, 0.1), np.log(B)),
      "nt_xent": (losses.nt_xent(z, z, 0.5), np.log(2 * B - 1)),
      "clip": (losses.clip(z, z, 20.0), np.log(B)),
      "moco": (losses.moco(z, z, many), np.log(2 * B + 1)),
      "moco_v3": (losses.moco_v3(z, z, z, z, 0.3), 2 * 2 * 0.3 * np.log(B)),
      "simcse": (losses.simcse(z, z, negative=z), np.log(2 * B)),
      "dense_retrieval": (losses.dense_retrieval(z, many), np.log(2 * B)),
      "sampled": (losses.sampled_softmax(z, z, negatives=many), np.log(3 * B)),
      "hard": (losses.sampled_softmax(z, z, hard_negatives=3), np.log(4)),
      "sgl": (losses.sgl(z, z, number), B * np.log(B)),
      "supcon": (losses.supcon(z, label), np.log(B - 1)),
      "nt_xent_labels": (losses.nt_xent_labels(z, label), np.log(B - 4 + 1)),
      "audioclip": (losses.audioclip(z, z, z), np.log(B)),
      "clip_distill": (losses.clip_distill(z, z, z, z, 5.0, 9.0), np.log(B)),
      # Where nothing can be told apart each triplet costs its margin.
      "triplet": (losses.triplet(z, z, z, 0.3), 0.3),
      "batch_all": (losses.triplet_batch_all(z, label, 0.3), 0.3),
      "batch_hard": (losses.triplet_batch_hard(z, label, 0.3), 0.3),
      "semihard": (losses.triplet_semihard(z, label, 0.3), 0.3),
    }
  )()
  for name, (value, want) in found.items():
    assert value == pytest.approx(float(want), rel=1e-5), name
  assert losses.byol(z, 2 * z) == pytest.approx(0, abs=1e-12)


def test_whitened_views():
  """Where there is nothing left to decorrelate."""
  x = normal(61, 64, D).astype(np.float64)
  x -= x.mean(0)
  white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
  white = jnp.asarray(white, jnp.float32)
  assert losses.vicreg(white, white) == pytest.approx(0, abs=1e-9)
  assert losses.barlow_twins(white, white) == pytest.approx(0, abs=1e-8)
  # Collapse costs both views the whole margin: 25 * (1 - sqrt(eps)).
  flat = jnp.ones((8, D))
  assert losses.vicreg(flat, flat) == pytest.approx(25 * 0.99, rel=1e-6)


def test_sinkhorn():
  scores = normal(62, 32, 8)
  codes = np.asarray(losses.sinkhorn(scores, 0.5, 200))
  np.testing.assert_allclose(codes.sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(codes.sum(0), 32 / 8, rtol=1e-5)
  # Rows that do not take part are as if they were not there.
  mask = np.arange(32) % 3 > 0
  some = np.asarray(losses.sinkhorn(scores, 0.5, mask=mask))
  assert not some[~mask].any()
  np.testing.assert_allclose(some[mask], losses.sinkhorn(scores[mask], 0.5), rtol=1e-5)
  assert np.isfinite(losses.sinkhorn(1e5 * scores, 0.05)).all()
  assert not np.asarray(losses.sinkhorn(scores, mask=np.zeros(32, bool))).any()


def test_stop_gradients():
  """Nothing at all flows to a teacher, a key, a queue or a code."""
  z, scores, mask = normal(63, B, D), normal(64, B, 3, K), jnp.asarray(MASK)
  teachers, new = list(TEACHERS.values()), normal(65, 8, D)
  stopped = [
    (lambda t: losses.byol(z, t), TARGET),
    (lambda t: losses.moco(z, t[0], t[1]), (TARGET, QUEUE)),
    (lambda t: losses.moco_v3(z, z, *t), (TARGET, TARGET)),
    (lambda t: losses.swav(scores, losses.swav_codes(t)), scores[:, :2]),
    (lambda t: losses.swav(scores, t), CODES),
    (lambda t: losses.dino(scores, losses.center_target(*t, 0.1)), (CODES, np.ones(K))),
    (lambda t: losses.dino(scores, t, pairs="v2"), CODES),
    (lambda t: losses.ibot(PATCHES, t, mask), PATCHES),
    (lambda t: losses.gram(PATCHES, t), PATCHES),
    (lambda t: losses.clip_distill(z, z, *t, 5.0, 9.0), teachers),
    (lambda t: losses.clip_distill(z, z, *teachers, 5.0, t), 9.0),
    (lambda t: losses.update_center(*t).sum(), (np.ones(K), CODES)),
    (lambda t: losses.enqueue(jnp.asarray(QUEUE), 8, t)[0].sum(), new),
    (lambda t: losses.push(jnp.asarray(QUEUE), t).sum(), new),
  ]
  given = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t) for _, t in stopped]
  total = lambda ts: sum(fn(t) for (fn, _), t in zip(stopped, ts))
  for n, grad in enumerate(jax.jit(jax.grad(total))(given)):
    assert all(not np.any(x) for x in jax.tree.leaves(grad)), n


def test_reductions():
  z, key, label = normal(66, B, D), normal(67, B, D), jnp.asarray(LABEL)
  scores, number = normal(68, B, 3, K), jnp.arange(B)
  reducing = {
    "koleo": lambda r: losses.koleo(z, reduction=r),
    "byol": lambda r: losses.byol(z, key, reduction=r),
    "swav": lambda r: losses.swav(scores, CODES, reduction=r),
    "triplet": lambda r: losses.triplet(z, key, z[::-1], reduction=r),
    "batch_hard": lambda r: losses.triplet_batch_hard(z, label, reduction=r),
    "moco": lambda r: losses.moco(z, key, QUEUE, reduction=r),
    "moco_v3": lambda r: losses.moco_v3(z, z, key, key, reduction=r),
    "simcse": lambda r: losses.simcse(z, key, reduction=r),
    "dense_retrieval": lambda r: losses.dense_retrieval(z, key, reduction=r),
    "supcon": lambda r: losses.supcon(z, label, reduction=r),
    "clip_distill": lambda r: losses.clip_distill(z, key, z, key, 1, 1, reduction=r),
    "bpr": lambda r: losses.bpr(z, key, z[::-1], reduction=r),
    "sgl": lambda r: losses.sgl(z, key, number, reduction=r),
    "sampled_softmax": lambda r: losses.sampled_softmax(z, key, reduction=r),
  }
  each = jax.jit(
    lambda: {
      name: [loss(r) for r in ("none", "mean", "sum")]
      for name, loss in reducing.items()
    }
  )()
  for name, (rows, mean, total) in each.items():
    assert rows.shape == (B,), name
    assert rows.mean() == pytest.approx(float(mean), rel=1e-5), name
    assert rows.sum() == pytest.approx(float(total), rel=1e-5), name
  with pytest.raises(ValueError, match="reduction is .* not 'median'"):
    losses.byol(z, key, reduction="median")


def test_queues():
  queue, pointer = jnp.zeros((6, 2)), jnp.asarray(0)
  for step in range(4):
    key = jnp.array([[step + 1.0, 0.0], [0.0, step + 1.0]])
    queue, pointer = losses.enqueue(queue, pointer, key)
  # The fourth batch took the place of the first; keys lie on the sphere.
  np.testing.assert_allclose(queue, np.tile(np.eye(2), (3, 1)), rtol=1e-6)
  assert pointer == 2
  marked = losses.enqueue(queue, pointer, -key)[0]
  np.testing.assert_allclose(marked[2:4], -np.eye(2), rtol=1e-6)
  with pytest.raises(ValueError, match="queue of 6 .* batch 4"):
    losses.enqueue(queue, pointer, jnp.ones((4, 2)))
  ordered = losses.push(jnp.arange(6.0), jnp.array([7.0, 8.0]))
  np.testing.assert_array_equal(ordered, [7, 8, 0, 1, 2, 3])


def test_padded_tokens():
  """Rows of weight zero play no part, whatever they hold."""
  student, target = normal(69, 6, K), softmax(normal(70, 6, K))
  weight = jnp.array([0.5, 0.5, 1.0, 1.0, 0.0, 0.0])
  student[4:], target[4:] = np.nan, np.nan
  loss = lambda s: losses.ibot_tokens(s, jnp.asarray(target), weight, 3)
  value, grad = jax.value_and_grad(loss)(jnp.asarray(student))
  want = losses.ibot_tokens(student[:4], target[:4], weight[:4], 3)
  assert value == pytest.approx(float(want), rel=1e-6)
  assert np.isfinite(grad).all()
  assert not grad[4:].any()


def test_edges():
  """One row, zero vectors, all alike: finite values and gradients."""
  zero, one = jnp.zeros((4, D)), jnp.ones((1, D))
  label = jnp.array([0, 0, 1, 1])
  cases = [
    (losses.koleo, one),
    (losses.koleo, zero),
    (lambda z: losses.byol(z, zero), zero),
    (lambda z: losses.barlow_twins(z, z), zero),
    (lambda z: losses.vicreg(z, z), zero),
    (lambda z: losses.triplet_batch_all(z, label), zero),
    (lambda z: losses.triplet_batch_hard(z, label), zero),
    (lambda z: losses.triplet_semihard(z, label), zero),
    (lambda z: losses.triplet_semihard(z, jnp.zeros(4, int)), zero),
    (lambda z: losses.triplet_batch_all(z, jnp.arange(4)), zero),
    (lambda z: losses.moco_v3(z, z, zero, zero), zero),
    (lambda z: losses.simcse(z, z, negative=z), one),
    (lambda z: losses.dense_retrieval(z, z), one),
    (lambda z: losses.supcon(z, jnp.zeros(1, int)), one),
    (lambda z: losses.nt_xent_labels(z, jnp.arange(4)), zero),
    (lambda z: losses.sampled_softmax(z, z, hard_negatives=2), one),
    (lambda z: losses.sampled_softmax(z, z, ids=label, hard_negatives=3), zero),
    (lambda z: losses.gram(z[None], z[None]), zero),
  ]
  results = jax.jit(
    lambda zs: [jax.value_and_grad(fn)(z) for (fn, _), z in zip(cases, zs)]
  )([z for _, z in cases])
  for n, result in enumerate(results):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result)), n
  with pytest.raises(ValueError, match="batch of 1"):
    losses.vicreg(one, one)


def test_bfloat16():
  """Operands as they come; statistics and results in float32."""
  half = lambda x: jnp.asarray(x, jnp.bfloat16) if np.ndim(x) else x
  names = ["barlow_twins", "vicreg", "koleo", "byol", "swav", "triplet_batch_hard"]
  names += ["simcse", "dense_retrieval", "nt_xent_labels", "clip_distill", "bpr"]
  inputs = {name: jax.tree.map(half, INPUTS[name]) for name in names}
  fixed = {name: FIXED[name] for name in names}
  values = jax.jit(lambda *args: together(*args)[1])(inputs, fixed)
  for name, value in values.items():
    assert value.dtype == jnp.float32, name
    rounded = {k: np.asarray(x, np.float64) for k, x in inputs[name].items()}
    want = CASES[name].twin(**rounded)
    assert value == pytest.approx(want, rel=2e-2, abs=2e-2), name


def test_precision():
  """float32 products ask for it: the default is bfloat16 passes on a TPU."""
  program = jax.jit(jax.grad(together, has_aux=True)).lower(INPUTS, FIXED).as_text()
  products = [line for line in program.splitlines() if "dot_general" in line]
  assert len(products) > 50
  assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_memory():
  """What loops over tiles itself stays far below one matrix of them."""
  rows = 4096
  z = jax.ShapeDtypeStruct((rows, 8), jnp.float32)
  number = jax.ShapeDtypeStruct((rows,), jnp.int32)

  def loss(z, number):
    return (
      losses.supcon(z, number)
      + losses.nt_xent_labels(z, number)
      + losses.sampled_softmax(z, z, ids=number, hard_negatives=4)
      + losses.clip_distill(z, z, z, z, 1.0, 1.0)
      + losses.koleo(z)
    )

  used = jax.jit(jax.grad(loss)).lower(z, number).compile().memory_analysis()
  assert used.temp_size_in_bytes < rows * rows * 4 / 2


def test_user_errors():
  z = jnp.ones((6, D))
  wrong = [
    (lambda: losses.barlow_twins(z, z, groups=4), "4 groups .* batch of 6"),
    (lambda: losses.koleo(z, groups=4), "4 groups .* batch of 6"),
    (lambda: losses.koleo(z, groups=2, axis_name="data"), "leave axis_name out"),
    (lambda: losses.dino(z[:, None], z[:, None], pairs="v3"), "'v3'"),
    (lambda: losses.gram(z[None], z[None], level="pixel"), "'pixel'"),
    (lambda: losses.gram(z[None], z[None], negatives="drop"), "'drop'"),
    (lambda: losses.triplet_batch_all(z, z[:, 0], mining="soft"), "'soft'"),
    (lambda: losses.dense_retrieval(z[:4], z), "6 passages for 4 queries"),
    (lambda: losses.audioclip(z, None, None), "two of audio, image and text"),
    (lambda: losses.cpc(z[None], z[None], jnp.ones((6, D, D))), "6 steps ahead"),
    (lambda: losses.push(z[:2], z), "6 new rows"),
    (
      lambda: losses.sampled_softmax(z, z, probability=z[:, 0], negatives=z),
      "exactly if items do",
    ),
  ]
  for call, message in wrong:
    with pytest.raises(ValueError, match=message):
      call()


def test_imports_only_jax_and_numpy():
  program = """
import sys
import jax, jax.numpy, numpy

KNOWN = {name.split(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)
KNOWN |= {"clj", "jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy"}

class Block:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] not in KNOWN:
      raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import clj.losses
assert "clj.models" not in sys.modules
try:
  import optax
except ImportError as error:
  print(error)
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == "optax is blocked"
