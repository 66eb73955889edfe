"""Accuracy of a classifier that is part of the method: fine-tuning, distillation."""

import functools

import jax
import jax.numpy as jnp

from clj.cli import UserError
from clj.evals.rows import check_rows, context_mesh, shard_rows


def accuracy(logits, labels) -> dict[str, float]:
  """Shares of the rows whose label is the highest logit, or among the five highest.

  Of equal logits the first class comes first.

  Args:
    logits: `[N, C]`, NumPy or JAX, split over the mesh of the context.
    labels: int `[N]`; rows with label -1 are left out.

  Returns:
    "top1" and, with more than five classes, "top5".

  Raises:
    UserError: shapes that do not fit, labels beyond the classes, no labelled row.
  """
  check_rows("logits", logits, labels)
  mesh, classes = context_mesh(), logits.shape[1]
  found = jax.device_get(
    _count(shard_rows(logits, mesh), shard_rows(labels, mesh, fill=-1), min(5, classes))
  )
  if found["beyond"]:
    raise UserError(
      f"{found['beyond']} rows have a label beyond the {classes} classes of the logits"
    )
  if not found["rows"]:
    raise UserError("no labelled row among the logits")
  result = {"top1": float(found["top1"] / found["rows"])}
  if classes > 5:
    result["top5"] = float(found["top5"] / found["rows"])
  return result


@functools.partial(jax.jit, static_argnums=2)
def _count(logits, labels, best: int):
  _, highest = jax.lax.top_k(logits.astype(jnp.float32), best)
  right = (highest == labels[:, None]) & (labels >= 0)[:, None]
  return {
    "top1": jnp.sum(right[:, 0]),
    "top5": jnp.sum(right),
    "rows": jnp.sum(labels >= 0),
    "beyond": jnp.sum(labels >= logits.shape[1]),
  }


def run(embedder, /, *, layer: str = "logits") -> dict[str, float]:
  """The evaluation "accuracy"; layer: the output that has the logits."""
  test = embedder.rows("test", (layer,))
  return accuracy(test[layer], test["label"])


def takes(embedder, /, *, layer="logits"):
  embedder.columns(layer)
  return [("test", layer)]
