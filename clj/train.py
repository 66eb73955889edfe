"""The train step and the loop around it. No method is named in here.

    restore -> for each step: next batch -> dispatch the step -> write the metrics of
    the one before -> maybe evaluate -> maybe checkpoint

Randomness is a function of (seed, step, row of the global batch), data of the step: the
same command gives the same run, however often it is killed and on any mesh.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from clj import augment as augmentation
from clj import optim as optimisers
from clj import sharding
from clj.cli import UserError
from clj.data import pipeline, sources, text
from clj.evaluate import best_metric, make_evaluate, summary
from clj.method import Method
from clj.methods import make_method
from clj.runs import checkpoint, log, processes, workdir
from clj.runs.init_from import config_of
from clj.runs.init_from import init_from as start_from

COMPLETE, STOPPED = 0, processes.AGAIN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  step: jax.Array  # int32 scalar: finished updates
  rng: jax.Array  # a typed key, constant: every step folds its number in
  params: Any
  extra: Any
  opt_state: Any


def make_augment(data: dict) -> Callable:
  """The augmentation that the section `data` of a config describes."""
  return augmentation.make(
    size=data["size"],
    views=data["views"],
    crop_scale=data["crop_scale"],
    crop_ratio=data["crop_ratio"],
    **data["augment"],
  )


def make_train_step(method: Method, tx, augment, schedules=None):
  """The step `(state, batch) -> (state, metrics)`: a pure function, to be jitted."""

  def gathered_loss(params, extra, *arguments):
    return method.loss(sharding.whole(params), sharding.whole(extra), *arguments)

  def train_step(state: TrainState, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    batch = augment(jax.random.fold_in(rng, 0), batch)
    grad_fn = jax.value_and_grad(gathered_loss, has_aux=True)
    (loss, (extra, aux)), grads = grad_fn(
      state.params, state.extra, batch, jax.random.fold_in(rng, 1), state.step
    )
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
  batch, mesh, *, seed, batch_size, total_steps, method, model, data, optim, rules=()
):
  """Sections of a config -> Program.

  batch: shapes and dtypes of a batch as the data pipeline gives it, by key.
  rules: what lies where, see `sharding.state_shardings`.
  """
  made, augment = make_method(method, model, total_steps), make_augment(data)
  given = batch.keys() | data["augment"].keys()  # which makes views of its own
  if missing := [key for key in made.needs if key not in given]:
    raise UserError(
      f"method {method['name']!r} needs {', '.join(missing)} in its batches; "
      f"{data['source']!r} gives {', '.join(batch)}"
    )
  frozen = "|".join(filter(None, (made.locked, optim.get("frozen", ""))))
  tx, schedules = optimisers.make(
    total_steps=total_steps, batch_size=batch_size, **optim | {"frozen": frozen}
  )
  # Abstract: the mesh may be of a topology that is not here (`clj.plan`).
  key = jax.eval_shape(lambda: jax.random.key(seed))
  views = jax.eval_shape(augment, key, batch)

  def init(key):
    rng, init_rng = jax.random.split(key)
    zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in views.items()}
    params, extra = made.init(init_rng, zeros)
    return TrainState(jnp.zeros((), jnp.int32), rng, params, extra, tx.init(params))

  state = jax.eval_shape(init, key)
  shardings = sharding.state_shardings(state, mesh, rules)
  struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  step = jax.jit(
    make_train_step(made, tx, augment, schedules),
    donate_argnums=0,
    # Without them leaves drift to shardings of the compiler's choice, and step 2
    # compiles again.
    out_shardings=(shardings, sharding.replicated(mesh)),
    compiler_options=sharding.compiler_options(mesh),
  )
  init = jax.jit(init, out_shardings=shardings)
  return Program(made, augment, init, step, jax.tree.map(struct, state, shardings))


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
  the user must mend is raised as ValueError, data.DataError, CheckpointError or
  FloatingPointError, in one line that says the way out.
  """
  config = {k: v for k, v in locals().items() if k != "directory"}
  for key in ("batch_size", "total_steps", "log_every"):
    if config[key] < 1:
      raise UserError(f"{key} is {config[key]}; it must be at least 1")
  grid = sharding.of_config(mesh)
  sharding.check_batch_size(batch_size, grid)
  workdir.check_config(directory, config)
  checkpoints = checkpoint.Checkpoints(
    directory,
    best=best_metric(evals),
    committed=lambda step: writer.say(f"step {step}: saved"),
  )
  evaluated = not evals or log.evaluated(directory, total_steps)
  finished = evaluated and checkpoints.steps()[-1:] == [total_steps]
  if processes.from_first(finished) and not checkpoints.agreed_fault(total_steps):
    print(f"{directory}: complete, all {total_steps} steps are done")
    print(summary(directory))
    return COMPLETE
  profile_from, profile_to = _profile_steps(profile)
  if (first := config_of(init_from)) and not processes.from_first(checkpoints.steps()):
    print(f"{init_from} comes first, in {directory}/first", flush=True)
    init_from = str(epath.Path(directory) / "first")
    if (code := train(init_from, **first | {"mesh": mesh})) != COMPLETE:
      return code

  source = sources.open_config(data, "train_split")
  if section := data.get("text"):
    captions = lambda: sources.captions_of(source)
    started = processes.from_first(bool(checkpoints.steps()))
    tokenizer = text.of_run(directory, section, captions, started=started)
    source = sources.tokenized(source, tokenizer)
    print(text.describe(tokenizer, source.truncated), flush=True)
  classes = len(source.class_names or ())
  if 0 < method.get("probe_classes", 0) < classes:
    raise UserError(
      f"method.probe_classes is {method['probe_classes']}, but {data['source']!r} has "
      f"{classes} classes; set it to that, or to 0"
    )
  read = lambda step, rows: contextlib.closing(
    pipeline.batches(
      source,
      seed=seed,
      batch_size=batch_size,
      step=step,
      rows=rows,
      size=data["size"],
      views=data["views"],
      scale=data["crop_scale"],
      ratio=data["crop_ratio"],
      threads=data["threads"] or None,
    )
  )
  with read(0, (0, 1)) as one_row:
    shapes = {
      key: jax.ShapeDtypeStruct(
        (batch_size, *rows.shape[1:]),
        rows.dtype,
        sharding=sharding.batch_sharding(grid),
      )
      for key, rows in next(one_row).items()
    }

  with jax.set_mesh(grid), processes.listening() as stopping:
    program = build(
      shapes,
      grid,
      seed=seed,
      batch_size=batch_size,
      total_steps=total_steps,
      method=method,
      model=model,
      data=data,
      optim=optim,
      rules=mesh.get("rules", ()),
    )
    if source.tokenizer is not None:
      _check_vocabulary(source.tokenizer, program.state.params)
    evaluate = make_evaluate(
      program.method.embed,
      program.augment,
      source,
      data=data,
      evals=evals,
      batch_size=batch_size,
      start="before" if init_from else "untrained",
    )
    restored = checkpoints.restore(program.state)
    if restored is None:
      start, seconds = 0, 0.0
      state = program.init(jax.random.key(seed))
      print(log.start_tables(grid, state.params), flush=True)
      if init_from:
        fresh = state
        state, report = start_from(state, init_from, init_rename)
        print(report, flush=True)
        _check_initial_text(init_from, source.tokenizer, fresh, state)
    else:
      state, clock, start = restored
      seconds = clock["seconds"]
      text.check_fingerprint(source.tokenizer, clock.get("tokenizer"), directory)
      print(f"{directory}: going on from step {start} of {total_steps}", flush=True)
    workdir.record_config(directory, config, start)
    started = processes.from_first(log.evaluated(directory, start))
    writer = log.Log(directory, start_step=start, total_steps=total_steps)
    meter = log.Meter(batch_size, start, seconds)
    scores = (start if started else -1, {})  # of the last evaluation: step, metrics
    due = lambda step: (
      bool(evals)
      and (step in (0, total_steps) or (eval_every > 0 and step % eval_every == 0))
    )
    pending = None  # (step, metrics) on the device, not looked at yet

    def settle():
      """Writes the metrics of the last step, once the device has finished it."""
      nonlocal pending
      if pending is None:
        return
      (step, metrics), pending = pending, None
      with meter.part("device"):
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
      processes.tell("step")
      checkpoints.check()
      if not metrics.pop("finite"):
        raise FloatingPointError(_not_finite(step, metrics["loss"], checkpoints))
      now = step % log_every == 0 or step == total_steps
      writer.progress(step, metrics["loss"], meter.rate(step), now)
      if now:
        line = {f"train/{name}": value for name, value in metrics.items()}
        line["train/examples"] = step * batch_size
        line["train/epoch"] = step * batch_size / len(source)
        if source.tokenizer is not None:
          line["data/truncated_captions"] = source.truncated
        writer.write(step, line | meter.read(step))

    def evaluate_now(step):
      nonlocal scores
      processes.tell("busy")
      writer.say(f"step {step}: evaluating")
      with meter.part("evaluation"):
        found = evaluate(
          state.params, state.extra, step, step == total_steps, writer, stopping
        )
      if found is not None:  # else stopped in the middle; done again after the restart
        writer.write(step, found | meter.read_part("evaluation"))
        writer.say(f"step {step}: evaluated")
        scores = step, found

    def save(step):
      processes.tell("busy")
      writer.say(f"step {step}: saving")
      with meter.part("checkpoint"):
        writer.sync()
        at, found = scores
        clock = {"seconds": meter.seconds()}
        if source.tokenizer is not None:
          clock["tokenizer"] = source.tokenizer.fingerprint
        checkpoints.save(step, state, clock, found if at == step else {})

    done, saved, stop_trace = start, start, None
    try:
      if due(start) and not started:
        evaluate_now(start)
      with read(start, sharding.process_rows(batch_size, grid)) as batches:
        meter.start()
        for step in range(start, total_steps):
          if stopping():
            break
          with meter.part("host_wait"):
            batch = sharding.to_global(next(batches), grid)
          if step == 0:
            _draw_views(writer, program.augment, state.rng, batch)
          if profile_from <= step < profile_to and stop_trace is None:
            stop_trace = log.start_trace(directory)
          with jax.transfer_guard("disallow"), meter.part("device"):
            state, metrics = program.step(state, batch)
          settle()  # the step before; the device is busy with this one meanwhile
          pending, done = (step + 1, metrics), step + 1
          last = done == total_steps
          if stop_trace is not None and (done == profile_to or last):
            settle()
            processes.tell("busy")
            stop_trace()
            stop_trace = None
          # What was evaluated is saved too: it may be the best.
          regular = checkpoint_every > 0 and done % checkpoint_every == 0
          save_due = last or regular or due(done)
          if due(done) or save_due:
            settle()
          if due(done):
            evaluate_now(done)
          if save_due:
            save(done)
            saved = done
      if saved != done:
        settle()
        save(done)
    finally:
      if stop_trace is not None:
        stop_trace()
      try:
        checkpoints.close()
      finally:
        writer.close()
  if source.bad:
    print(f"{len(source.bad)} corrupt records were replaced by the next good ones")
  if done < total_steps or (evals and scores[0] != done):
    kept = f"saved at step {done}" if done else "before the first step"
    print(f"stopped by SIGTERM, {kept}; the same command goes on")
    return STOPPED
  print(summary(directory))
  return COMPLETE


def _check_vocabulary(tokenizer, params):
  """An id beyond the text tower's table would show as a loss that is not finite."""
  table = params.get("text", {}).get("token")
  if table is not None and table.shape[0] < tokenizer.vocab_size:
    raise UserError(
      f"model.text.vocab is {table.shape[0]}, but the tokenizer has "
      f"{tokenizer.vocab_size} ids; set it to that, or lower data.text.vocab_size"
    )


def _check_initial_text(path, tokenizer, fresh, state):
  """Refuses a table of tokens that was learned with other ids than batches have."""
  table = lambda state: state.params.get("text", {}).get("token")
  root = epath.Path(path)
  root = root.parent.parent if root.parent.name == "checkpoints" else root
  if table(state) is table(fresh) or not (root / "tokenizer").exists():
    return
  if not text.load(root / "tokenizer").same_ids(tokenizer):
    raise UserError(
      f"init_from {path}: its text tower was trained with another vocabulary; set "
      f"data.text.tokenizer={root / 'tokenizer'}, or leave it out by init_rename"
    )


def _not_finite(step: int, loss: float, checkpoints) -> str:
  checkpoints.wait()
  good = checkpoints.steps()
  kept = f"the checkpoint of step {good[-1]} is good; " if good else ""
  return (
    f"loss {loss} or a parameter is not finite at step {step}; {kept}"
    "lower optim.learning_rate or lengthen the warm-up, in another --workdir"
  )


def _profile_steps(profile: str) -> tuple[int, int]:
  """ "10:15" -> (10, 15), "" -> (-1, -1): the steps that are traced."""
  if not profile:
    return -1, -1
  try:
    first, last = map(int, profile.split(":"))
    if not 0 <= first < last:
      raise ValueError
  except ValueError:
    raise UserError(
      f"profile is {profile!r}; it must be FIRST:LAST, such as 10:15"
    ) from None
  return first, last


def _draw_views(writer, augment, rng, batch):
  """Puts the first step's augmented views on TensorBoard, a row for each example."""
  if "image" not in batch:
    return
  rng = jax.random.fold_in(jax.random.fold_in(rng, 0), 0)
  views = jax.jit(augment)(rng, batch)["image"]
  mine = np.concatenate([np.asarray(s.data) for s in views.addressable_shards[:8]])
  picture = log.grid((mine[:8] * 255).round().astype(np.uint8))
  writer.picture("augmented", picture, 0)
