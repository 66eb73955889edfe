"""Weighted nearest neighbours on frozen features, and features that need no network.

The protocol of instance discrimination (arXiv 1805.01978, section 3.4) that published
kNN tables share: cosine similarity s, the k nearest of the training set vote with
exp(s / T). k = 200 with T = 0.1 there and in lightly's tables, k = 20 with T = 0.07 in
DINO's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from clj.cli import UserError
from clj.evals.rows import (
  check_rows,
  check_widths,
  class_count,
  context_mesh,
  fetch,
  normalize,
  picture_column,
  shard_rows,
)
from clj.runs import log

# Products have this one shape on any number of devices, so that every similarity has
# the same bits: queries at a time (over all devices), rows of the bank at a time.
QUERIES = 256
BLOCK = 1024
LEAST = 1e-30  # the weight of a neighbour so far away that it would round to 0


def knn(
  train_features,
  train_labels,
  test_features,
  test_labels,
  *,
  num_classes: int,
  k: int = 200,
  temperature: float = 0.1,
) -> dict[str, float]:
  """Accuracy of the weighted vote of the k nearest training rows, cosine similarity.

  The training set lies split over the mesh of the context (`jax.set_mesh`; one device
  without), and each device sees all queries: it keeps its own k best, then the best of
  all devices vote. A device holds at most 256 rows of similarities at a time. The
  result is the same on any number of devices.

  Args:
    train_features, test_features: `[N, d]` and `[M, d]`, NumPy or JAX, not normalised.
    train_labels, test_labels: int `[N]` and `[M]`; rows with label -1 are left out.
    num_classes: labels are below it.
    k: number of neighbours; all of them where there are fewer.
    temperature: T.

  Returns:
    "top1" and, with more than five classes, "top5": shares of the test rows. A class
    that none of the neighbours is of is no prediction, so that top5 may be of fewer
    than five classes.

  Raises:
    ValueError: no labelled row in one of the sets, or shapes that do not fit.
  """
  check_rows("train", train_features, train_labels)
  check_rows("test", test_features, test_labels)
  check_widths(train_features, test_features)
  if k < 1 or temperature <= 0:
    raise UserError(f"k={k}, temperature={temperature}: both must be positive")
  mesh = context_mesh()
  bank = shard_rows(train_features, mesh, 1), shard_rows(train_labels, mesh, 1, -1)
  queries = max(1, QUERIES // mesh.size)
  tests = (
    shard_rows(test_features, mesh, queries),
    shard_rows(test_labels, mesh, queries, -1),
  )
  count = _count(mesh, int(num_classes), int(k), queries)
  found = jax.device_get(count(*bank, *tests, jnp.float32(temperature)))
  for name in ("train", "test"):
    if not found[name]:
      raise UserError(f"no labelled row among the {name} features")
  result = {"top1": float(found["top1"] / found["test"])}
  if num_classes > 5:
    result["top5"] = float(found["top5"] / found["test"])
  return result


@functools.lru_cache(maxsize=8)
def _count(mesh: Mesh, num_classes: int, k: int, queries: int):
  """The jitted count of right answers; `queries` at a time from each device."""
  axes = mesh.axis_names

  def shard(bank_nd, label_n, test_md, target_m, temperature):
    """All arrays are this device's rows."""
    count = len(bank_nd)
    pad = -count % BLOCK
    bank_nd = jnp.pad(normalize(bank_nd), ((0, pad), (0, 0)))
    label_n = jnp.pad(label_n, (0, pad), constant_values=-1)
    blocks = bank_nd.reshape(-1, BLOCK, bank_nd.shape[1])
    label_nc = jax.nn.one_hot(label_n, num_classes)
    train = jax.lax.psum((label_n >= 0).sum(), axes)
    near = jnp.minimum(k, train)

    def chunk(inputs):
      test_qd, target_q = inputs
      query_Qd = jax.lax.all_gather(normalize(test_qd), axes, tiled=True)
      target_Q = jax.lax.all_gather(target_q, axes, tiled=True)
      sim_bQn = jax.lax.map(
        lambda block: jnp.matmul(
          query_Qd, block.T, precision=jax.lax.Precision.HIGHEST
        ),
        blocks,
      )
      sim_Qn = jnp.moveaxis(sim_bQn, 0, 1).reshape(len(query_Qd), -1)
      sim_Qn = jnp.where(label_n[None] >= 0, sim_Qn, -jnp.inf)
      best_Q1 = jax.lax.pmax(sim_Qn.max(1), axes)[:, None]
      weight_Qn = jnp.exp((sim_Qn - best_Q1) / temperature)
      # However far away, a neighbour has a vote.
      weight_Qn = jnp.where(
        _nearest(sim_Qn, near, axes), jnp.maximum(weight_Qn, LEAST), 0.0
      )
      vote_Qc = jax.lax.psum(
        jnp.matmul(weight_Qn, label_nc, precision=jax.lax.Precision.HIGHEST), axes
      )
      votes, best = jax.lax.top_k(vote_Qc, min(5, num_classes))
      right = (best == target_Q[:, None]) & (target_Q[:, None] >= 0) & (votes > 0)
      return right[:, 0].sum(), right.sum(), (target_Q >= 0).sum()

    top1, top5, test = jax.lax.map(
      chunk,
      (
        test_md.reshape(-1, queries, test_md.shape[1]),
        target_m.reshape(-1, queries),
      ),
    )
    # Every device counted all queries of its chunks.
    counts = {"top1": top1.sum(), "top5": top5.sum(), "test": test.sum()}
    return jax.lax.pmax(counts, axes) | {"train": train}

  rows = PartitionSpec(axes)
  return jax.jit(
    jax.shard_map(
      shard,
      mesh=mesh,
      in_specs=(rows, rows, rows, rows, PartitionSpec()),
      out_specs=PartitionSpec(),
    )
  )


def _nearest(sim_Qn, near, axes):
  """Which columns are among the `near` largest of their row, over all devices.

  The threshold is found bit by bit, by counting: sorting takes ten times as long on a
  CPU. Of equal similarities at the threshold the first in the order of the bank count.
  """
  bits = jax.lax.bitcast_convert_type(sim_Qn, jnp.int32)
  key_Qn = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)  # ordered as floats

  def count(mask_Qn):
    return mask_Qn.sum(1, dtype=jnp.int32)

  def halve(_, bounds):
    low, high = bounds  # at least `near` keys are >= low, fewer are > high
    middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)  # rounded up
    enough = jax.lax.psum(count(key_Qn >= middle[:, None]), axes) >= near
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

  limits = jnp.iinfo(jnp.int32)
  bounds = tuple(jnp.full(len(key_Qn), x, jnp.int32) for x in (limits.min, limits.max))
  threshold_Q, _ = jax.lax.fori_loop(0, 32, halve, bounds)
  above_Qn = key_Qn > threshold_Q[:, None]
  equal_Qn = key_Qn == threshold_Q[:, None]
  left_Q = near - jax.lax.psum(count(above_Qn), axes)
  equals = jax.lax.all_gather(count(equal_Qn), axes)  # [devices, Q]
  mine = jax.lax.axis_index(axes)
  earlier = jnp.arange(len(equals))[:, None] < mine
  before_Q = jnp.where(earlier, equals, 0).sum(0)
  place_Qn = before_Q[:, None] + jnp.cumsum(equal_Qn, axis=1, dtype=jnp.int32)
  return above_Qn | (equal_Qn & (place_Qn <= left_Q[:, None]))


def raw_pixels(images) -> jax.Array:
  """Images `[N, H, W, 3]`, uint8 or in [0, 1], to features `[N, H W 3]`, uncentred."""
  scale = 255 if images.dtype == jnp.uint8 else 1
  return jnp.asarray(images).reshape(len(images), -1).astype(jnp.float32) / scale


def color_histogram(images, bins: int = 8) -> jax.Array:
  """Images `[N, H, W, 3]`, uint8 or in [0, 1], to colour shares `[N, bins ** 3]`."""
  scale = 256 if images.dtype == jnp.uint8 else 1
  place = jnp.asarray(images).astype(jnp.float32) * (bins / scale)
  place = jnp.clip(place.astype(jnp.int32), 0, bins - 1)
  code = (place[..., 0] * bins + place[..., 1]) * bins + place[..., 2]
  code = code.reshape(len(code), -1)
  counts = jax.vmap(lambda row: jnp.bincount(row, length=bins**3))(code)
  return counts / jnp.float32(code.shape[1])


def run(
  embedder, /, *, layer: str = "features", k: int = 200, temperature: float = 0.1
) -> dict[str, float]:
  """The evaluation "knn"; layer: the output whose neighbours are looked for."""
  train, test = (embedder.rows(split, (layer,)) for split in ("train", "test"))
  return _of_rows(embedder, train, test, layer, k, temperature)


def takes(embedder, /, *, layer="features", **options):
  del options
  embedder.columns(layer)
  return [("train", layer), ("test", layer)]


def _of_rows(embedder, train, test, name, k, temperature):
  return knn(
    train[name],
    train["label"],
    test[name],
    test["label"],
    num_classes=class_count(embedder, train["label"], test["label"]),
    k=k,
    temperature=temperature,
  )


# The same without a network, for pictures in memory: those of photographs say nothing.


def _of_pictures(describe, center=False):
  def baseline(embedder, /, *, layer="features", k=200, temperature=0.1):
    column = picture_column(embedder, layer)
    if column is None or embedder.source("train").held is None:
      return None
    train, test = (embedder.raw(s, describe, column) for s in ("train", "test"))
    if center:
      weight = (train["index"] >= 0)[:, None]
      pixels = train[describe.__name__]
      mean = (pixels * weight).sum(0, keepdims=True) / weight.sum()
      train, test = (x | {describe.__name__: x[describe.__name__] - mean}
                     for x in (train, test))  # fmt: skip
    name = describe.__name__
    return _of_rows(embedder, train, test, name, k, temperature)["top1"]

  return baseline


def _only_view(describe):
  """For evaluation's `[N, 1, H, W, 3]`."""
  return functools.wraps(describe)(lambda pictures: describe(pictures[:, 0]))


_PIXELS = _only_view(raw_pixels)
BASELINES = {
  "color_histogram": _of_pictures(_only_view(color_histogram)),
  "raw_pixels": _of_pictures(_PIXELS),
  "centered_pixels": _of_pictures(_PIXELS, center=True),
}


def neighbours(embedder, /, *, layer="features", rows=8, columns=8, **options):
  """A picture: some test records, and to the right of each its nearest in training.

  None where the features are not those of pictures.
  """
  del options
  if (column := picture_column(embedder, layer)) is None:
    return None
  train, test = (embedder.rows(split, (layer,)) for split in ("train", "test"))
  first = jnp.argsort(jnp.where(test["index"] < 0, 2**31 - 1, test["index"]))[:rows]
  similarity = normalize(test[layer][first]) @ normalize(train[layer]).T
  similarity = jnp.where(train["index"][None] >= 0, similarity, -2.0)
  _, near = jax.lax.top_k(similarity, columns)
  near, records = fetch(train["index"][near]), fetch(test["index"][first])

  def seen(split, indices):
    source = embedder.source(split)
    test = source.columns[column].test
    return [test(source.picture(i, column))[column][0] for i in indices]

  pictures = [
    np.stack(seen("test", [record]) + seen("train", those))
    for record, those in zip(records.tolist(), near.tolist())
    if record >= 0
  ]
  return log.grid(np.stack(pictures))
