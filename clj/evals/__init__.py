"""Every evaluation: a name for configs -> `(train, test, classes, **options)`.

`train` and `test` are what `clj.evaluate.embed_source` gives: arrays `[N, d]` by name,
"label" and "index" `[N]` beside them; "views" of `test` is a pair of arrays `[M, d]`,
the features of two augmented views of the same pictures. Values are numbers by name.
"""

from clj.evals import diagnostics, knn, linear_probe


def _by_label(evaluation):
  def run(train, test, classes, *, layer="features", **options):
    return evaluation(
      train[layer],
      train["label"],
      test[layer],
      test["label"],
      num_classes=classes,
      **options,
    )

  return run


def _diagnostics(train, test, classes, *, layer="features"):
  del train, classes
  # Rows that only fill up a batch have index -1.
  return diagnostics.diagnostics(test[layer], test.get("views"), labels=test["index"])


NEEDS_LABELS = ("knn", "linear_probe")
EVALS = {
  "knn": _by_label(knn.knn),
  "linear_probe": _by_label(linear_probe.linear_probe),
  "diagnostics": _diagnostics,
}
