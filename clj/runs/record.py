"""What a run writes while it goes: metrics, evaluations, checkpoints, a profile.

The loop works one step ahead: the metrics of a step are looked at when the next one is
on its way, so that the device never waits for its host.
"""

import contextlib
from collections.abc import Callable

import jax

from clj.cli import UserError
from clj.runs import log, processes
from clj.runs.checkpoint import Checkpoints


class Record:
  """Metrics, evaluations and checkpoints of one start of a run; a context.

  Args:
    config: of the run.
    writer, meter, checkpoints: where it goes.
    evaluate: `(params, extra, step, final) -> metrics by name`; None where it was
      stopped on the way.
    about: step -> more metrics for its line.
    clock: JSON-able, saved beside the state of every checkpoint.
    start: finished steps; evaluated: whether they have been evaluated.

  Attributes:
    done: steps that were dispatched. part: as of the meter.
  """

  def __init__(
    self,
    directory,
    config: dict,
    *,
    writer: log.Log,
    meter: log.Meter,
    checkpoints: Checkpoints,
    evaluate: Callable,
    about: Callable[[int], dict],
    clock: dict,
    start: int,
    evaluated: bool,
  ):
    self._directory, self._profile = directory, profile_steps(config["profile"])
    self._writer, self._meter, self._checkpoints = writer, meter, checkpoints
    self._total_steps, self._log_every = config["total_steps"], config["log_every"]
    self._eval_every = config["eval_every"]
    self._checkpoint_every = config["checkpoint_every"]
    self._has_evals = bool(config["evals"])
    self._evaluate, self._about, self._clock = evaluate, about, clock
    self._pending = None  # (step, metrics) on the device, not looked at yet
    self._scores = (start if evaluated else -1, {})  # of the last evaluation
    self.done = self._saved = start
    self._stop_trace = None
    self.part = meter.part

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._stop_trace is not None:
      self._stop_trace()
    try:
      self._checkpoints.close()
    finally:
      self._writer.close()

  def begin(self, state):
    """Evaluates what training starts from, if it is due; then the time runs."""
    if self._evaluation_due(self.done) and self._scores[0] != self.done:
      self._evaluate_now(state)
    self._meter.start()

  def trace(self, step: int):
    """Starts the profile, if it is due before this step."""
    first, last = self._profile
    if first <= step < last and self._stop_trace is None:
      self._stop_trace = log.start_trace(self._directory)

  def step(self, done: int, state, metrics):
    """Takes note of a step that was dispatched; may evaluate and save."""
    self._settle()  # the step before; the device is busy with this one meanwhile
    self._pending, self.done = (done, metrics), done
    last = done == self._total_steps
    if self._stop_trace is not None and (done == self._profile[1] or last):
      self._settle()
      processes.tell("busy")
      self._stop_trace()
      self._stop_trace = None
    every = self._checkpoint_every
    evaluation = self._evaluation_due(done)
    # What was evaluated is saved too: it may be the best.
    if last or evaluation or (every > 0 and done % every == 0):
      self._settle()
      if evaluation:
        self._evaluate_now(state)
      self._save(state)

  def end(self, state) -> bool:
    """Saves what is not saved yet; returns whether the run is complete."""
    if self._saved != self.done:
      self._settle()
      self._save(state)
    evaluated = not self._has_evals or self._scores[0] == self.done
    return self.done == self._total_steps and evaluated

  def _evaluation_due(self, step):
    regular = self._eval_every > 0 and step % self._eval_every == 0
    return self._has_evals and (step in (0, self._total_steps) or regular)

  def _settle(self):
    """Writes the metrics of the last step, once the device has finished it."""
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    with self.part("device"):
      metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    processes.tell("step")
    self._checkpoints.check()
    if not metrics.pop("finite"):
      raise FloatingPointError(self._not_finite(step, metrics["loss"]))
    now = step % self._log_every == 0 or step == self._total_steps
    speed, mfu = self._meter.speed(step), self._meter.mfu(step)
    self._writer.progress(step, metrics["loss"], speed, now, mfu)
    if now:
      line = {f"train/{name}": value for name, value in metrics.items()}
      self._writer.write(step, line | self._about(step) | self._meter.read(step))

  def _evaluate_now(self, state):
    step = self.done
    processes.tell("busy")
    self._writer.say(f"step {step}: evaluating")
    try:
      with self.part("evaluation"):
        final = step == self._total_steps
        found = self._evaluate(state.params, state.extra, step, final)
    except Exception:
      if self._saved != step:
        self._save(state)  # nothing that was trained is lost
      raise
    if found is not None:  # else stopped in the middle; done again after the restart
      self._writer.write(step, found | self._meter.read_part("evaluation"))
      self._writer.say(f"step {step}: evaluated")
      self._scores = step, found

  def _save(self, state):
    step = self.done
    processes.tell("busy")
    self._writer.say(f"step {step}: saving")
    with self.part("checkpoint"):
      self._writer.sync()
      at, found = self._scores
      clock = {"seconds": self._meter.seconds(), **self._clock}
      self._checkpoints.save(step, state, clock, found if at == step else {})
    self._saved = step

  def _not_finite(self, step: int, loss: float) -> str:
    self._checkpoints.wait()
    good = self._checkpoints.steps()
    kept = f"the checkpoint of step {good[-1]} is good; " if good else ""
    return (
      f"loss {loss} or a parameter is not finite at step {step}; {kept}"
      "lower optim.learning_rate or lengthen the warm-up, in another --workdir"
    )


def profile_steps(profile: str) -> tuple[int, int]:
  """ "10:15" -> (10, 15), "" -> (-1, -1): the steps that are traced."""
  if not profile:
    return -1, -1
  with contextlib.suppress(ValueError):
    first, last = map(int, profile.split(":"))
    if 0 <= first < last:
      return first, last
  raise UserError(f"profile is {profile!r}; it must be FIRST:LAST, such as 10:15")
