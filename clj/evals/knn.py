"""Weighted nearest neighbours on frozen features, and features that need no network.

The protocol of instance discrimination (arXiv 1805.01978, section 3.4) that published
kNN tables share: cosine similarity s, the k nearest of the training set vote with
exp(s / T). k = 200 with T = 0.1 there and in lightly's tables, k = 20 with T = 0.07 in
DINO's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from clj.evals.rows import check_rows, context_mesh, normalize, shard_rows

# Products have this one shape on any number of devices, so that every similarity has
# the same bits: queries at a time (over all devices), rows of the bank at a time.
QUERIES = 256
BLOCK = 1024


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
    "top1" and, with more than five classes, "top5": shares of the test rows.

  Raises:
    ValueError: no labelled row in one of the sets, or shapes that do not fit.
  """
  check_rows("train", train_features, train_labels)
  check_rows("test", test_features, test_labels)
  if train_features.shape[1:] != test_features.shape[1:]:
    raise ValueError(
      f"features of shape {train_features.shape} and {test_features.shape}: "
      "train and test must have one width"
    )
  if k < 1 or temperature <= 0:
    raise ValueError(f"k={k}, temperature={temperature}: both must be positive")
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
      raise ValueError(f"no labelled row among the {name} features")
  result = {"top1": float(found["top1"] / found["test"])}
  if num_classes > 5:
    result["top5"] = float(found["top5"] / found["test"])
  return result


@functools.lru_cache(maxsize=8)
def _count(mesh: Mesh, num_classes: int, k: int, queries: int):
  """The jitted count of right answers; `queries` at a time from each device."""
  axes = mesh.axis_names
  size = mesh.size

  def shard(bank_nd, label_n, test_md, target_m, temperature):
    """All arrays are this device's rows."""
    count = len(bank_nd)
    pad = -count % BLOCK
    bank_nd = jnp.pad(normalize(bank_nd), ((0, pad), (0, 0)))
    label_n = jnp.pad(label_n, (0, pad), constant_values=-1)
    blocks = bank_nd.reshape(-1, BLOCK, bank_nd.shape[1])
    near = min(k, len(bank_nd))

    def chunk(inputs):
      test_qd, target_q = inputs
      query_Qd = jax.lax.all_gather(normalize(test_qd), axes, tiled=True)
      sim_bQn = jax.lax.map(
        lambda block: jnp.matmul(
          query_Qd, block.T, precision=jax.lax.Precision.HIGHEST
        ),
        blocks,
      )
      sim_Qn = jnp.moveaxis(sim_bQn, 0, 1).reshape(len(query_Qd), -1)
      sim_Qn = jnp.where(label_n >= 0, sim_Qn, -jnp.inf)
      sim_Qk, index_Qk = jax.lax.top_k(sim_Qn, near)
      # Every device gets the candidates of all devices for its own queries, in the
      # order of the bank, so that ties fall as they do on one device.
      candidates = (
        jax.lax.all_to_all(x.reshape(size, queries, near), axes, 0, 0)
        for x in (sim_Qk, label_n[index_Qk])
      )
      sim_qk, label_qk = (
        jnp.moveaxis(x, 0, 1).reshape(queries, -1) for x in candidates
      )
      sim_qk, index_qk = jax.lax.top_k(sim_qk, min(k, sim_qk.shape[1]))
      label_qk = jnp.take_along_axis(label_qk, index_qk, axis=1)
      weight_qk = jnp.exp((sim_qk - sim_qk[:, :1]) / temperature)
      weight_qk = jnp.where(label_qk >= 0, weight_qk, 0.0)
      classes = jnp.arange(num_classes)[None, None, :]
      vote_qkc = jnp.where(label_qk[..., None] == classes, weight_qk[..., None], 0.0)
      _, best = jax.lax.top_k(vote_qkc.sum(axis=1), min(5, num_classes))
      right = (best == target_q[:, None]) & (target_q[:, None] >= 0)
      return right[:, 0].sum(), right.sum()

    top1, top5 = jax.lax.map(
      chunk,
      (
        test_md.reshape(-1, queries, test_md.shape[1]),
        target_m.reshape(-1, queries),
      ),
    )
    counts = {
      "top1": top1.sum(),
      "top5": top5.sum(),
      "train": (label_n >= 0).sum(),
      "test": (target_m >= 0).sum(),
    }
    return jax.lax.psum(counts, axes)

  rows = PartitionSpec(axes)
  return jax.jit(
    jax.shard_map(
      shard,
      mesh=mesh,
      in_specs=(rows, rows, rows, rows, PartitionSpec()),
      out_specs=PartitionSpec(),
    )
  )


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
