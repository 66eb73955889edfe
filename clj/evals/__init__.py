"""Evaluations by name: what a config's section `evals` may ask for.

    "evals": {"knn": {"k": 20}, "seen": {"name": "zeroshot", "data": {...}}, ...}

A new evaluation is one file and one entry of EVALS. Of two that could say which
checkpoint is the best one, the one further up does.
"""

from collections.abc import Callable
from typing import NamedTuple

from clj.evals import accuracy, diagnostics, knn, linear_probe, retrieval, zeroshot
from clj.evals.rows import chance, most_frequent


def _nothing(*_, **__):
  return {}


class Evaluation(NamedTuple):
  """What is done with the model at work, an `Embedder`.

  run: `(embedder, **options) -> {name: number}`; the options are those of the config.
  takes: `(embedder, **options) -> [(split, output), (split, output, rename, each)]`,
    all that `run` asks of `embedder.rows`, so that evaluations share a pass, and what
    cannot be is known before the training. Raises UserError where it cannot.
  needs: keys that the batches of these splits must have, such as "label".
  best: `(**options) -> (name, sign)`, the value by which a run keeps its best
    checkpoint: the highest (1) or the lowest (-1); None: no value is.
  before: `(**options) -> {name: template}`, values that are kept from before training
    to be shown beside; the template has "{}" for "untrained", or "before".
  baselines: `{name: (embedder, **options) -> number}`, by the same protocol without a
    network, once before training; None where there is no such number.
  pictures: `{name: (embedder, **options) -> uint8 [H, W, 3]}`, for TensorBoard, or
    None where there is none.
  warning: `values -> line`, "" where all is well.
  """

  run: Callable
  takes: Callable
  needs: tuple[str, ...] = ()
  best: Callable | None = None
  before: Callable = _nothing
  baselines: dict[str, Callable] = {}
  pictures: dict[str, Callable] = {}
  warning: Callable = lambda values: ""


def _top1(**_):
  return "top1", 1


def _untrained(**_):
  return {"top1": "{}"}


GUESSES = {"chance": chance, "most_frequent": most_frequent}

EVALS = {
  "zeroshot": Evaluation(
    zeroshot.run,
    takes=zeroshot.takes,
    needs=("label",),
    best=_top1,
    before=_untrained,
  ),
  "retrieval": Evaluation(
    retrieval.run,
    takes=retrieval.takes,
    best=retrieval.best,
    before=retrieval.before,
  ),
  "accuracy": Evaluation(
    accuracy.run,
    takes=accuracy.takes,
    needs=("label",),
    best=_top1,
    before=_untrained,
    baselines=GUESSES,
  ),
  "knn": Evaluation(
    knn.run,
    takes=knn.takes,
    needs=("label",),
    best=_top1,
    before=_untrained,
    baselines=GUESSES | knn.BASELINES,
    pictures={"neighbours": knn.neighbours},
  ),
  "linear_probe": Evaluation(
    linear_probe.run,
    takes=knn.takes,
    needs=("label",),
    best=_top1,
    before=_untrained,
    baselines=GUESSES,
  ),
  "diagnostics": Evaluation(
    diagnostics.run,
    takes=diagnostics.takes,
    warning=diagnostics.warning,
  ),
}
