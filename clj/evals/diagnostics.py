"""Numbers that show collapse, on frozen features."""

import jax
import jax.numpy as jnp
import numpy as np

from clj.evals.rows import context_mesh, normalize, shard_rows

# Verdicts. Normalised features with a common part c, |c| = 1, and a rest of size r have
# feature_std r: below 0.05 all pairs have a cosine above 0.997. A healthy encoder keeps
# several directions even where it has learned to separate just a few classes.
LOW_STD = 0.05
LOW_RANK = 2.0

SAMPLE = 2048  # rows for uniformity, whose pairs are 2.1 million


def diagnostics(features, view_pairs=None, *, labels=None) -> dict[str, float]:
  """Measures of collapse; split over the mesh of the context.

  Args:
    features: `[N, d]`, NumPy or JAX, not normalised.
    view_pairs: `(z1, z2)`, `[M, d]` each: features of two views of the same pictures.
    labels: `[N]`; where given, rows with label -1 (which fill up a batch) are left out.

  Returns:
    "feature_std": the root of the total variance of the L2-normalised features: 0 where
      all are the same, 1 where they are spread around the sphere. (So it is sqrt(d)
      times the deviation per dimension that SimSiam plots, arXiv 2011.10566, section
      4.1, in the root mean square over dimensions.)
    "effective_rank": exp of the entropy of the covariance's eigenvalues as shares of
      their sum, between 1 and d (after Roy and Vetterli 2007).
    "uniformity": log of the mean of exp(-2 |zi - zj|^2) over pairs of different rows,
      normalised, of at most 2048 rows: 0 at collapse, about -4 where uniform on the
      sphere (arXiv 2005.10242, equation 5).
    "alignment", with `view_pairs`: mean of |z1 - z2|^2, normalised, from 0 to 4
      (the same paper, equation 4).
    "collapsed": 1.0 where feature_std < 0.05 or effective_rank < 2, else 0.0.
  """
  mesh = context_mesh()
  valid = np.ones(len(features), bool) if labels is None else labels >= 0
  found = _measure(shard_rows(features, mesh), shard_rows(valid, mesh))
  if view_pairs is not None:
    z1, z2 = (shard_rows(z, mesh) for z in view_pairs)
    found["alignment"] = _alignment(z1, z2, len(view_pairs[0]))
  found = jax.device_get(found)
  values = np.linalg.eigvalsh(found.pop("covariance").astype(np.float64))
  result = {name: float(value) for name, value in found.items()}
  result["effective_rank"] = _effective_rank(values)
  low = result["feature_std"] < LOW_STD or result["effective_rank"] < LOW_RANK
  return result | {"collapsed": float(low)}


def warning(diagnosis: dict[str, float]) -> str:
  """One line for the terminal where the features have collapsed, else ""."""
  if not diagnosis["collapsed"]:
    return ""
  std, rank = diagnosis["feature_std"], diagnosis["effective_rank"]
  what = "all features are nearly the same" if std < LOW_STD else "few directions left"
  return (
    f"warning: the representation has collapsed, {what}: feature_std {std:.3g} "
    f"(low: < {LOW_STD}), effective_rank {rank:.3g} (low: < {LOW_RANK:g})"
  )


@jax.jit
def _measure(x_nd, valid_n):
  x_nd = x_nd.astype(jnp.float32)
  weight_n1 = valid_n.astype(jnp.float32)[:, None]
  count = jnp.maximum(jnp.sum(weight_n1), 1.0)

  def center(x_nd):
    mean_d = jnp.sum(weight_n1 * x_nd, axis=0) / count
    return weight_n1 * (x_nd - mean_d[None])

  z_nd = normalize(x_nd)
  centered_nd = center(x_nd)
  # A sample of rows from end to end: neighbours may be of one class.
  take = min(SAMPLE, len(x_nd))
  rows = np.arange(take) * len(x_nd) // take
  z_Sd, valid_S = z_nd[rows], valid_n[rows]
  cosine_SS = jnp.matmul(z_Sd, z_Sd.T, precision=jax.lax.Precision.HIGHEST)
  pair_SS = valid_S[:, None] & valid_S[None, :] & ~jnp.eye(take, dtype=bool)
  kernel_SS = jnp.where(pair_SS, jnp.exp(-4 * (1 - cosine_SS)), 0.0)
  return {
    "feature_std": jnp.sqrt(jnp.sum(jnp.square(center(z_nd))) / count),
    "covariance": jnp.matmul(
      centered_nd.T, centered_nd, precision=jax.lax.Precision.HIGHEST
    )
    / count,
    "uniformity": jnp.log(jnp.sum(kernel_SS) / jnp.maximum(jnp.sum(pair_SS), 1)),
  }


@jax.jit
def _alignment(z1_md, z2_md, count):
  """Mean over the first `count` rows; the others fill up the last device."""
  distance_m = jnp.sum(jnp.square(normalize(z1_md) - normalize(z2_md)), axis=-1)
  return jnp.sum(jnp.where(jnp.arange(len(z1_md)) < count, distance_m, 0.0)) / count


def _effective_rank(eigenvalues: np.ndarray) -> float:
  shares = np.maximum(eigenvalues, 0)
  total = shares.sum()
  if not total > 0:
    return 1.0
  shares = shares[shares > 0] / total
  return float(np.exp(-np.sum(shares * np.log(shares))))


VIEWED = 512  # rows whose views are compared


def run(embedder, /, *, layer: str = "features") -> dict[str, float]:
  """The evaluation "diagnostics"; layer: the output that may have collapsed."""
  test = embedder.rows("test", (layer,))
  views = [view[layer] for view in embedder.views("test", (layer,), VIEWED)][:2]
  # Rows that only fill up a batch have index -1.
  return diagnostics(test[layer], tuple(views) or None, labels=test["index"])


def takes(embedder, /, *, layer="features"):
  embedder.columns(layer)
  return [("test", layer)]
