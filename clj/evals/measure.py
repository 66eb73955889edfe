"""The evaluations of a config, one after the other, on one model at work."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from clj.cli import UserError, check_keywords
from clj.evals import EVALS, Evaluation
from clj.evals.embedder import (
  Embedder,
  Stopped,
  make_embedder,
  memory,
  never,
  programs,
)
from clj.runs import log, workdir


class Planned(NamedTuple):
  """An evaluation of a config, its data opened."""

  label: str
  evaluation: Evaluation
  options: dict
  final_only: bool
  data: Any  # a clj.data.Data


def make_evaluate(
  embed: Callable,
  augment: Callable | None,
  data,
  *,
  evals: dict,
  batch_size: int,
  start: str = "untrained",
  shapes=None,
) -> Callable:
  """Builds the evaluation of a config.

  embed: a method's `embed`. augment: of its training, `(rng, batch) -> batch`.
  data: that of the run, a `clj.data.Data`.
  evals: the config's section, by label the options of an evaluation: those of its
    `run`; "name", its name in EVALS, where the label is another one; "final_only"; and
    "data", a data set of its own: {"source": ..., "test_split": ..., "columns": {...}}.
    Of the run's section `data` it keeps only what the model sees of a column.
  batch_size: of the training.
  start: what step 0 is called, see below.
  shapes: (params, extra), or their shapes; where given, everything is checked now.

  Returns `evaluate(params, extra, step, final, writer=None, stopping=never)`. It gives
  metrics by name, such as "eval/knn/top1" and, the number of test records,
  "eval/knn/records"; or None if it was stopped. At step 0 come baselines, and what the
  evaluation says before training: "eval/knn/untrained" ("before" in the place of
  "untrained" where the weights were there already). With `final` the evaluations run
  too that have `final_only`.

  Raises UserError, one line, for an evaluation that does not exist or cannot be: here,
  or with the first call what depends on what the model makes.
  """
  if not evals:
    return lambda *_, **__: {}
  plans = [_plan(label, options, data) for label, options in evals.items()]
  compiled, checked = programs(embed, augment), []

  def at_work(params, extra, stopping=never):
    """Each plan with the model at work on its data; all checked, once."""
    on_data = functools.partial(
      make_embedder,
      compiled,
      params,
      extra,
      batch_size=batch_size,
      run=data,
      known=memory(),
      stopping=stopping,
    )
    found = {id(plan.data): on_data(plan.data) for plan in plans}
    pairs = [(plan, found[id(plan.data)]) for plan in plans]
    for plan, embedder in () if checked else pairs:
      _check(plan, embedder)
    checked.append(True)
    return pairs

  if shapes is not None:
    at_work(*shapes)

  def evaluate(params, extra, step, final, writer=None, stopping=never):
    with contextlib.suppress(Stopped):
      pairs = at_work(params, extra, stopping)
      due = [(p, embedder) for p, embedder in pairs if final or not p.final_only]
      metrics = _measure(due, step, start)
      if step and writer is not None and jax.process_count() == 1:
        _draw(due, writer, step)
      return metrics

  return evaluate


def _measure(due: list[tuple[Planned, Embedder]], step: int, start: str) -> dict:
  """Metrics of the evaluations that are due, by their whole names."""
  for plan, embedder in due:
    for split, output, *how in plan.evaluation.takes(embedder, **plan.options):
      embedder.expect(split, (output,), *how)
  metrics = {}
  for plan, embedder in due:
    values = plan.evaluation.run(embedder, **plan.options)
    if step and (line := plan.evaluation.warning(values)):
      print(line, flush=True)  # at step 0 a network may well look bad
    values["records"] = float(len(embedder.source("test")))
    if step == 0:
      values |= _beside(plan, embedder, values, start)
    metrics |= {f"eval/{plan.label}/{key}": value for key, value in values.items()}
  return metrics


def _plan(label: str, options: dict, data) -> Planned:
  """Raises UserError for what is wrong whatever the model makes."""
  options = dict(options)
  name, own = options.pop("name", label), options.pop("data", None)
  final_only = options.pop("final_only", False)
  evaluation = _named(name)
  check_keywords(evaluation.run, options, f"evals.{label}")
  return Planned(
    label, evaluation, options, final_only, data.other(own) if own else data
  )


def _named(name: str) -> Evaluation:
  if name not in EVALS:
    raise UserError(f"no evaluation {name!r}; there are: {', '.join(EVALS)}")
  return EVALS[name]


def _check(plan: Planned, embedder: Embedder):
  """Refuses what a data set or a model cannot give, before it is waited for."""
  where = f"evaluation {plan.label!r}"
  out = f"leave it out of evals, or give it a data set (evals.{plan.label}.data)"

  def needed(split):
    source = embedder.source(split)
    for key in plan.evaluation.needs:
      if key not in source.source.gives:
        raise UserError(
          f"{where} needs {key!r}, and {source.name} has none (it gives "
          f"{', '.join(source.source.gives)}); {out}"
        )

  needed("test")
  try:
    takes = plan.evaluation.takes(embedder, **plan.options)
  except UserError as error:
    raise UserError(f"{where}: {error}; {out}") from None
  for split in {split for split, *_ in takes} - {"test"}:
    needed(split)


def _beside(plan: Planned, embedder: Embedder, values: dict, start: str) -> dict:
  """What is known at step 0 alone, to be shown beside what comes later."""
  evaluation, options = plan.evaluation, plan.options
  beside = {
    name.format(start): values[value]
    for value, name in evaluation.before(**options).items()
    if value in values
  }
  for name, baseline in evaluation.baselines.items():
    if (value := baseline(embedder, **options)) is not None:
      beside[name] = value
  return beside


def _draw(due, writer, step: int):
  drawn = set()  # once, where the same evaluation comes under several labels
  for plan, embedder in due:
    for name, draw in plan.evaluation.pictures.items():
      if name not in drawn:
        drawn.add(name)
        if (picture := draw(embedder, **plan.options)) is not None:
          writer.picture(name, picture, step)


def best_metric(evals: dict) -> tuple[str, int] | None:
  """The metric by which the best checkpoint is kept, and its sign: -1, the lowest.

  Of the evaluations that come at every `eval_every` the one whose name comes first in
  EVALS; None where no evaluation has such a value.
  """
  order, found = list(EVALS), []
  for label, options in evals.items():
    options = dict(options)
    name = options.pop("name", label)
    evaluation = _named(name)
    if evaluation.best is None or options.pop("final_only", False):
      continue
    options.pop("data", None)
    value, sign = evaluation.best(**options)
    found.append((order.index(name), label != name, f"eval/{label}/{value}", sign))
  if not found:
    return None
  _, _, name, sign = min(found, key=lambda x: x[:2])
  return name, sign


def summary(directory) -> str:
  """The last evaluation of a run as a table, the baselines beside it."""
  config = workdir.read_config(directory)
  return "\n" + table(log.last_values(directory, "eval/"), config["evals"])


def table(values: dict[str, float], evals: dict) -> str:
  """Metrics "eval/LABEL/..." with the protocol of each evaluation beside the first."""
  rows = []
  for label, options in evals.items():
    evaluation = _named(options.get("name", label))
    layer = inspect.signature(evaluation.run).parameters.get("layer")
    shown = {"layer": layer.default} if layer else {}
    shown |= {k: v for k, v in options.items() if k != "name"}
    protocol = ", ".join(f"{k} {v}" for k, v in shown.items())
    for key in sorted(k for k in values if k.startswith(f"eval/{label}/")):
      if key == f"eval/{label}/records":
        continue
      rows.append((key.removeprefix("eval/"), f"{values[key]:.4f}", protocol))
      protocol = ""
  return log.table(rows, ("evaluation", "value", "protocol"))
