"""Zero-shot classification: an image goes to the class whose prompts are nearest.

Radford et al., 2021, arXiv:2103.00020, section 3.1.4: the classifier's weight for a
class is the mean of the normalised embeddings of its name in several templates,
normalised again.
"""

import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, PartitionSpec

from clj.cli import UserError
from clj.evals.rows import check_rows, context_mesh, normalize, shard_rows

BLOCK = 256  # images that a device compares with all classes at a time

# A general set for photographs; "{}" is the name of the class.
TEMPLATES = (
  "{}",
  "a photo of a {}.",
  "a photo of the {}.",
  "a photo of one {}.",
  "a photo of several {}.",
  "a picture showing a {}.",
  "a close-up of a {}.",
  "a {} seen from afar.",
  "a small {}.",
  "a large {}.",
  "a bright photo of a {}.",
  "a dark photo of a {}.",
  "a sharp photo of a {}.",
  "a blurry photo of a {}.",
  "a part of a {}.",
  "a drawing of a {}.",
)


def zeroshot(image, labels, classifier) -> dict[str, float]:
  """Accuracy of the nearest class, cosine similarity.

  Args:
    image: `[N, d]`, NumPy or JAX, split over the mesh of the context.
    labels: int `[N]`, rows of `classifier`; rows with label -1 are left out.
    classifier: `[C, d]`, a row a class; see `make_classifier`.

  Returns:
    "top1" and, with more than five classes, "top5": shares of the images; "chance",
    1 / C; "most_frequent", the share of the most frequent class.

  Raises:
    ValueError: shapes that do not fit, labels beyond the classes, no labelled image.
  """
  check_rows("image", image, labels)
  if classifier.ndim != 2 or classifier.shape[1] != image.shape[1]:
    raise UserError(
      f"embeddings of images {image.shape} and of classes {classifier.shape}: give "
      "[N, d] and [C, d]"
    )
  mesh, classes = context_mesh(), len(classifier)
  found = jax.device_get(
    _count(mesh, min(5, classes))(
      shard_rows(image, mesh, BLOCK), shard_rows(labels, mesh, BLOCK, -1), classifier
    )
  )
  if found["beyond"]:
    raise UserError(
      f"{found['beyond']} images have a label beyond the {classes} classes"
    )
  if not (count := found["labels"].sum()):
    raise UserError("no labelled row among the images")
  result = {
    "top1": float(found["top1"] / count),
    "chance": 1 / classes,
    "most_frequent": float(found["labels"].max() / count),
  }
  if classes > 5:
    result["top5"] = float(found["top5"] / count)
  return result


@functools.lru_cache(maxsize=8)
def _count(mesh: Mesh, best: int):
  axes = mesh.axis_names

  def shard(image_nd, label_n, class_Cd):
    class_Cd = normalize(class_Cd)
    C = len(class_Cd)

    def block(inputs):
      image_bd, label_b = inputs
      sim_bC = jnp.matmul(
        normalize(image_bd), class_Cd.T, precision=jax.lax.Precision.HIGHEST
      )
      _, nearest = jax.lax.top_k(sim_bC, best)
      return (nearest == label_b[:, None]) & (label_b >= 0)[:, None]

    right = jax.lax.map(
      block,
      (image_nd.reshape(-1, BLOCK, image_nd.shape[1]), label_n.reshape(-1, BLOCK)),
    )
    counts = {
      "top1": right[..., 0].sum(),
      "top5": right.sum(),
      "beyond": (label_n >= C).sum(),
      "labels": jnp.zeros(C, jnp.int32).at[label_n].add(label_n >= 0, mode="drop"),
    }
    return jax.lax.psum(counts, axes)

  rows, all_of_it = PartitionSpec(axes), PartitionSpec()
  return jax.jit(
    jax.shard_map(
      shard,
      mesh=mesh,
      in_specs=(rows, rows, all_of_it),
      out_specs=all_of_it,
      check_vma=False,
    )
  )


def make_classifier(
  embed_text: Callable[[Sequence[str]], np.ndarray],
  class_names: Sequence[str],
  templates: Sequence[str] = TEMPLATES,
) -> np.ndarray:
  """`[C, d]`, float32 of length 1: the classes' prompts, averaged.

  embed_text: n texts -> `[n, d]`. templates: each with "{}" where the name belongs.
  """
  prompts = [t.replace("{}", name) for t in templates for name in class_names]
  z = np.asarray(embed_text(prompts), np.float32)
  z = _unit(z).reshape(len(templates), len(class_names), -1)
  return _unit(z.mean(0))


def _unit(z):
  return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def read_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
  """Templates as they are, or from a file, one a line; "" is the general set."""
  if isinstance(templates, str):
    templates = _lines("templates", templates) if templates else TEMPLATES
  without = [t for t in templates if "{}" not in t]
  if without or not templates:
    wrong = repr(without[0]) if without else "no template"
    raise UserError(f"{wrong}: a template has {{}} where the class's name belongs")
  return tuple(templates)


def read_class_names(
  names: Sequence[str] | None, path: str, source: str
) -> tuple[str, ...]:
  """Readable names of the classes, in the order of the labels.

  names: those of the data set; path: of a file, one name a line, that replaces them
  ("": none). Raises ValueError where neither is readable.
  """
  if path:
    given = _lines("classnames", path)
    if names and len(given) != len(names):
      raise UserError(
        f"classnames {path} has {len(given)} names, but {source} {len(names)} classes"
      )
    return given
  if not names:
    raise UserError(f"{source} has no class names; set evals.zeroshot.classnames=FILE")
  if all(re.fullmatch(r"n\d{8}", name) for name in names):
    raise UserError(
      f"the class names of {source} are WordNet ids ({names[0]}, ...), which no text "
      "tower knows: set evals.zeroshot.classnames to a file of readable names, one a "
      "line in the order of the ids, such as the 1,000 of CLIP's notebook "
      "Prompt_Engineering_for_ImageNet.ipynb"
    )
  return tuple(name.replace("_", " ") for name in names)


def _lines(what: str, path: str) -> tuple[str, ...]:
  path = epath.Path(path)
  if not path.exists():
    raise UserError(f"{what} {path}: no such file")
  lines = [line.strip() for line in path.read_text().splitlines()]
  if not (lines := tuple(line for line in lines if line)):
    raise UserError(f"{what} {path} is empty")
  return lines


def run(
  embedder,
  /,
  *,
  query: str = "image",
  bank: str = "text",
  templates: str | Sequence[str] = "",
  classnames: str = "",
) -> dict[str, float]:
  """The evaluation "zeroshot".

  query: the output that is classified. bank: that of the prompts, in the same space.
  templates, classnames: see `read_templates` and `read_class_names`.
  """
  split = embedder.source("test")
  names = read_class_names(split.classes.get("label"), classnames, split.name)
  classifier = make_classifier(
    lambda prompts: embedder.texts(prompts, (bank,))[bank],
    names,
    read_templates(templates),
  )
  test = embedder.rows("test", (query,))
  return zeroshot(test[query], test["label"], classifier)


def takes(
  embedder, /, *, query="image", bank="text", templates="", classnames="", **options
):
  del options
  split = embedder.source("test")
  read_class_names(split.classes.get("label"), classnames, split.name)
  read_templates(templates)
  embedder.columns(query)
  columns = embedder.columns(bank, of_run=True)
  if [column.tokenizer is None for column in columns.values()] != [False]:
    raise UserError(f"{bank!r} is made of {', '.join(columns)}: prompts are texts")
  return [("test", query)]
