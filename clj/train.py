"""The train step and the loop around it. No method is named in here.

    restore -> for each step: next batch -> dispatch the step -> write the metrics of
    the one before -> maybe evaluate -> maybe checkpoint

Randomness is a function of (seed, step, row of the global batch), data of the step: the
same command gives the same run, however often it is killed and on any mesh.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath

from clj import augment as augmentation
from clj import optim as optimisers
from clj import sharding
from clj.cli import UserError
from clj.data import open_data
from clj.evals.measure import best_metric, make_evaluate, summary
from clj.interop.init_from import config_of, init_from
from clj.method import Method
from clj.methods import make_method
from clj.planning import chips
from clj.runs import checkpoint, log, processes, workdir
from clj.runs.record import Record, profile_steps

COMPLETE, STOPPED = 0, processes.AGAIN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  step: jax.Array  # int32 scalar: finished updates
  rng: jax.Array  # a typed key, constant: every step folds its number in
  params: Any
  extra: Any
  opt_state: Any


def make_train_step(method: Method, tx, augment, schedules=None):
  """The step `(state, batch) -> (state, metrics)`: a pure function, to be jitted."""

  @jax.named_scope("towers")  # what is in no other scope inside it
  def gathered_loss(params, extra, *arguments):
    return method.loss(sharding.whole(params), sharding.whole(extra), *arguments)

  def train_step(state: TrainState, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    with jax.named_scope("augmentation"):
      batch = augment(jax.random.fold_in(rng, 0), batch)
    grad_fn = jax.value_and_grad(gathered_loss, has_aux=True)
    (loss, (extra, aux)), grads = grad_fn(
      state.params, state.extra, batch, jax.random.fold_in(rng, 1), state.step
    )
    with jax.named_scope("optimiser"):
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      params, extra = method.post(params, extra, state.step)
    metrics = {"loss": loss, **aux.metrics}
    metrics |= {name: at(state.step) for name, at in (schedules or {}).items()}
    for name, tree in {"grad_norm": grads, "update_norm": updates}.items():
      metrics[name] = optax.global_norm(tree)
      metrics |= {f"{name}/{k}": optax.global_norm(v) for k, v in tree.items()}
    state = TrainState(state.step + 1, state.rng, params, extra, opt_state)
    # A finite loss may still leave a broken state behind.
    metrics["finite"] = jnp.isfinite(loss) & _all_finite(state)
    return state, metrics

  return train_step


def _all_finite(tree):
  floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


class Program(NamedTuple):
  """What runs on the devices, ready to compile; nothing in it holds an array."""

  method: Method
  augment: Callable
  init: Callable  # key -> TrainState, jitted with its shardings
  step: Callable  # (state, batch) -> (state, metrics), jitted, the state donated
  state: TrainState  # of ShapeDtypeStructs with shardings


def build(
  batch, mesh, *, seed, batch_size, total_steps, method, model, augment, optim, rules=()
):
  """Sections of a config -> Program.

  batch: shapes and dtypes of a batch as the data pipeline gives it, by key.
  augment: the section `data.augment`.
  rules: what lies where, see `sharding.state_shardings`.
  """
  made, views_of = make_method(method, model, total_steps), augmentation.make(augment)
  frozen = "|".join(filter(None, (made.locked, optim.get("frozen", ""))))
  tx, schedules = optimisers.make(
    total_steps=total_steps, batch_size=batch_size, **optim | {"frozen": frozen}
  )
  # Abstract: the mesh may be of a topology that is not here (`clj.plan`).
  key = jax.eval_shape(lambda: jax.random.key(seed))
  views = jax.eval_shape(views_of, key, batch)
  if missing := [key for key in made.needs if key not in views]:
    raise UserError(
      f"method {method['name']!r} needs {', '.join(missing)} in its batches; they have "
      f"{', '.join(views)}: name it in data.columns or data.augment"
    )

  def init(key):
    rng, init_rng = jax.random.split(key)
    zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in views.items()}
    params, extra = made.init(init_rng, zeros)
    return TrainState(jnp.zeros((), jnp.int32), rng, params, extra, tx.init(params))

  state = jax.eval_shape(init, key)
  shardings = sharding.state_shardings(state, mesh, rules)
  struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  step = jax.jit(
    make_train_step(made, tx, views_of, schedules),
    donate_argnums=0,
    # Without them leaves drift to shardings of the compiler's choice, and step 2
    # compiles again.
    out_shardings=(shardings, sharding.replicated(mesh)),
    compiler_options=sharding.compiler_options(mesh),
  )
  init = jax.jit(init, out_shardings=shardings)
  return Program(made, views_of, init, step, jax.tree.map(struct, state, shardings))


def train(
  directory,
  *,
  seed: int,
  batch_size: int,
  total_steps: int,
  log_every: int,
  eval_every: int,
  checkpoint_every: int,
  init_from: str,
  init_rename,
  profile: str,
  method: dict,
  model: dict,
  data: dict,
  optim: dict,
  mesh: dict,
  evals: dict,
) -> int:
  """Trains to `total_steps`, going on from the newest checkpoint in `directory`.

  The keyword arguments are the keys of a config; `configs/simclr.py` explains them.
  Where `init_from` names a config, that one is trained first, in `directory`/first.
  Returns the exit code: 0 complete, 75 stopped by SIGTERM with everything saved. What
  the user must mend is raised as UserError or FloatingPointError, in one line that says
  the way out.
  """
  config = {k: v for k, v in locals().items() if k != "directory"}
  grid = _check(directory, config)
  checkpoints = checkpoint.Checkpoints(directory, best=best_metric(evals))
  if _is_complete(directory, config, checkpoints):
    print(f"{directory}: complete, all {total_steps} steps are done")
    print(summary(directory))
    return COMPLETE
  if (first := config_of(init_from)) and not processes.from_first(checkpoints.steps()):
    print(f"{init_from} comes first, in {directory}/first", flush=True)
    init_from = str(epath.Path(directory) / "first")
    if (code := train(init_from, **first | {"mesh": mesh})) != COMPLETE:
      return code
  with jax.set_mesh(grid), processes.listening() as stopping:
    run = _set_up(directory, config, init_from, grid, checkpoints, stopping)
    with run.record:
      complete = _loop(run, grid, stopping)
  if run.data.train.bad:
    print(f"{len(run.data.train.bad)} corrupt records were replaced by good ones")
  if not complete:
    done = run.record.done
    kept = f"saved at step {done}" if done else "before the first step"
    print(f"stopped by SIGTERM, {kept}; the same command goes on")
    return STOPPED
  print(summary(directory))
  return COMPLETE


class Run(NamedTuple):
  """What the loop works with. steps: those to do. constants: keys of every batch."""

  program: Program
  state: TrainState
  data: Any
  batches: Callable  # step -> iterator of batches, a context
  steps: range
  constants: dict
  record: Record


def _loop(run: Run, grid, stopping) -> bool:
  """Takes the steps; returns whether the run is complete."""
  state = run.state
  run.record.begin(state)
  with run.batches(run.steps.start) as batches:
    for step in run.steps:
      if stopping():
        break
      with run.record.part("host_wait"):
        batch = sharding.to_global(next(batches), grid) | run.constants
      run.record.trace(step)
      with jax.transfer_guard("disallow"), run.record.part("device"):
        state, metrics = run.program.step(state, batch)
      run.record.step(step + 1, state, metrics)
  return run.record.end(state)


# Setting up.


def _check(directory, config):
  """The mesh; raises UserError for a config that cannot be, or not in `directory`."""
  for key in ("batch_size", "total_steps", "log_every"):
    if config[key] < 1:
      raise UserError(f"{key} is {config[key]}; it must be at least 1")
  profile_steps(config["profile"])  # before a file is open
  grid = sharding.of_config(config["mesh"])
  sharding.check_batch_size(config["batch_size"], grid)
  workdir.check_config(directory, config)
  return grid


def _is_complete(directory, config, checkpoints) -> bool:
  steps, evals = config["total_steps"], config["evals"]
  evaluated = not evals or log.evaluated(directory, steps)
  finished = evaluated and checkpoints.steps()[-1:] == [steps]
  return processes.from_first(finished) and not checkpoints.agreed_fault(steps)


def _set_up(directory, config, init_from, grid, checkpoints, stopping) -> Run:
  """Opens the data, builds the program and restores or starts its state.

  init_from: that of the config, or where the config that it names was trained.
  """
  batch_size, seed = config["batch_size"], config["seed"]
  started = processes.from_first(bool(checkpoints.steps()))
  data = open_data(config["data"], workdir=directory, started=started)
  if data.facts:
    print(data.facts, flush=True)
  mesh_rows = sharding.process_rows(batch_size, grid)
  batches = lambda step, rows=mesh_rows: contextlib.closing(
    data.batches(seed=seed, batch_size=batch_size, step=step, rows=rows)
  )
  shapes = batch_shapes(data, batch_size, grid)
  program = build(
    shapes,
    grid,
    augment=config["data"].get("augment", {}),
    rules=config["mesh"].get("rules", ()),
    **{k: config[k] for k in ("seed", "batch_size", "total_steps")},
    **{k: config[k] for k in ("method", "model", "optim")},
  )
  _check_limits(program, data.limits)
  evaluate = make_evaluate(
    program.method.embed,
    program.augment,
    data,
    evals=config["evals"],
    batch_size=batch_size,
    start="before" if init_from else "untrained",
    shapes=(program.state.params, program.state.extra),
  )
  state, start, seconds = _first_state(
    directory, config, init_from, grid, program, checkpoints, data
  )
  writer = log.Log(directory, start_step=start, total_steps=config["total_steps"])
  checkpoints.committed = lambda step: writer.say(f"step {step}: saved")
  if start == 0 and jax.process_index() == 0:
    with contextlib.ExitStack() as stack:
      stack.callback(writer.close)  # where data that were not looked at yet are bad
      _draw_views(writer, program.augment, state.rng, batches)
      stack.pop_all()
  record = Record(
    directory,
    config,
    writer=writer,
    meter=log.Meter(batch_size, start, seconds, **_utilisation(program, shapes)),
    checkpoints=checkpoints,
    evaluate=functools.partial(evaluate, writer=writer, stopping=stopping),
    about=lambda step: {
      "train/examples": step * batch_size,
      "train/epoch": step * batch_size / len(data.train),
      **data.metrics,
    },
    clock={"columns": data.saved},
    start=start,
    evaluated=processes.from_first(log.evaluated(directory, start)),
  )
  constants = sharding.to_all(data.constants, grid)
  steps = range(start, config["total_steps"])
  return Run(program, state, data, batches, steps, constants, record)


def _utilisation(program, shapes) -> dict:
  """FLOPs of a step and the device's peak; the loop finds the step compiled.

  By XLA's count, which takes the body of a loop (`scan`) once: too few there.
  """
  cost = program.step.lower(program.state, shapes).compile().cost_analysis()
  peak = chips.peak_flops(jax.local_devices()[0])
  return {"flops": (cost or {}).get("flops"), "peak": peak}


def batch_shapes(data, batch_size: int, grid) -> dict:
  """Shapes of a training batch with their shardings, by key."""
  split, whole = sharding.batch_sharding(grid), sharding.replicated(grid)
  rows = {
    key: jax.ShapeDtypeStruct((batch_size, *row.shape), row.dtype, sharding=split)
    for key, row in data.spec.items()
  }
  return rows | {
    key: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole)
    for key, array in data.constants.items()
  }


def _first_state(directory, config, path, grid, program, checkpoints, data):
  """What training goes on or starts from: state, finished steps, seconds trained."""
  restored = checkpoints.restore(program.state)
  if restored is not None:
    state, clock, start = restored
    _check_columns(data.saved, clock.get("columns", {}), directory)
    print(f"{directory}: going on from step {start} of {config['total_steps']}")
    workdir.record_config(directory, config, start)
    return state, start, clock["seconds"]
  state = program.init(jax.random.key(config["seed"]))
  print(log.start_tables(grid, state.params), flush=True)
  if path:
    params, extra, report = init_from(
      state.params, state.extra, path, config["init_rename"], data.saved
    )
    state = dataclasses.replace(state, params=params, extra=extra)
    print(report, flush=True)
  workdir.record_config(directory, config, 0)
  return state, 0, 0.0


def _check_columns(now: dict, saved: dict, directory):
  """Refuses data whose values mean something else than to the checkpoint."""
  for name in now.keys() | saved.keys():
    if now.get(name) != saved.get(name):
      raise UserError(
        f"{directory}: column {name!r} is not what the checkpoint was trained with "
        f"({saved.get(name)} there, {now.get(name)} now); its values would mean "
        "something else: put the data, or the directory tokenizer, back"
      )


def _check_limits(program, limits):
  """An id beyond a table of the model would show as a loss that is not finite."""
  for key, rows in program.method.limits(program.state.params).items():
    if rows < limits.get(key, 0):
      raise UserError(
        f"the data has {limits[key]} different values of {key!r}, but the model takes "
        f"{rows}: change the model's number (vocab, classes), or the column's"
      )


def _draw_views(writer, augment, rng, batches):
  """Puts the first step's views of eight examples on TensorBoard, a row for each."""
  with batches(0, (0, 8)) as few, sharding.on_one_device():
    rng = jax.random.wrap_key_data(jax.device_get(jax.random.key_data(rng)))
    rng = jax.random.fold_in(jax.random.fold_in(rng, 0), 0)
    views = jax.jit(augment)(rng, next(few))
  for key, picture in log.grids(views).items():
    writer.picture(f"augmented/{key}", picture, 0)
