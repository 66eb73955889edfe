"""Every evaluation: a name for configs -> `(train, test, task, **options)`.

`train` and `test` are what `clj.evaluate.embed_source` gives: arrays `[N, d]` by name,
"label" and "index" `[N]` beside them; "views" of `test` is a pair of arrays `[M, d]`,
the features of two augmented views of the same pictures. `train` is None for what is
not in `NEEDS_TRAIN`. Values are numbers by name.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from clj.evals import diagnostics, knn, linear_probe, retrieval, zeroshot
from clj.evals.rows import fetch


class Task(NamedTuple):
  """What there is beside the embeddings.

  name: of the data set.
  class_names: a name for each label; empty where there are none.
  embed_text: texts -> arrays `[n, d]` by name, "text" among them.
  embed_captions: every caption of `test` once: arrays `[M, d]` by name, and "index"
    `[M]`, the record of each, and "tokens" `[M, L]`.
  """

  name: str
  class_names: tuple[str, ...]
  embed_text: Callable[[Sequence[str]], dict[str, np.ndarray]]
  embed_captions: Callable[[], dict]


def _by_label(evaluation):
  def run(train, test, task, *, layer="features", **options):
    return evaluation(
      train[layer],
      train["label"],
      test[layer],
      test["label"],
      num_classes=len(task.class_names),
      **options,
    )

  return run


def _diagnostics(train, test, task, *, layer="features"):
  del train, task
  # Rows that only fill up a batch have index -1.
  return diagnostics.diagnostics(test[layer], test.get("views"), labels=test["index"])


def _zeroshot(train, test, task, *, templates="", classnames="", prefix=""):
  """prefix: of the names of the embeddings, such as "trained_"."""
  del train
  names = zeroshot.read_class_names(task.class_names, classnames, task.name)
  classifier = zeroshot.make_classifier(
    lambda texts: task.embed_text(texts)[f"{prefix}text"],
    names,
    zeroshot.read_templates(templates),
  )
  return zeroshot.zeroshot(test[f"{prefix}image"], test["label"], classifier)


def _retrieval(train, test, task, *, prefix="", ks=(1, 5, 10)):
  del train
  captions = task.embed_captions()
  image_ids, text_ids = retrieval.match_captions(
    *(fetch(x) for x in (test["index"], captions["index"], captions["tokens"]))
  )
  return retrieval.retrieval(
    test[f"{prefix}image"], captions[f"{prefix}text"], image_ids, text_ids, ks=tuple(ks)
  )


NEEDS_TRAIN = ("knn", "linear_probe")
NEEDS_LABELS = ("knn", "linear_probe", "zeroshot")
NEEDS_TEXT = ("zeroshot", "retrieval")
# What is kept of the first evaluation, before training, to be shown beside the last.
BASELINES = {
  "top1": "{}",
  "image_to_text/recall@10": "image_to_text/{}@10",
  "text_to_image/recall@10": "text_to_image/{}@10",
}
EVALS = {
  "knn": _by_label(knn.knn),
  "linear_probe": _by_label(linear_probe.linear_probe),
  "diagnostics": _diagnostics,
  "zeroshot": _zeroshot,
  "retrieval": _retrieval,
}
