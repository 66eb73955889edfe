"""Numbers that change with the step: rates, decays, momenta, temperatures.

A schedule is a pure function of the step, which counts finished updates: 0 gives the
value of the first one. Steps are integers, of any shape; values are float32 of that
shape. A config describes one by a number, which is constant, or by a dict:

  {"name": "constant", "value": 0.04}
  {"name": "linear", "start": 1.0, "end": 0.5}
  {"name": "cosine", "start": 0.04, "end": 0.4}
  {"name": "steps", "values": (0.03, 0.003, 0.0003), "at": (0.6, 0.8)}

A position in the run is a number of steps where it is an int, and a share of the run
where it is a float. Any of them also takes

  warmup_steps or warmup_fraction: a linear warm-up of that length comes first, from
    `warmup_start` (0) to the first value. A line or a cosine begins after it.
  warmup_endpoint: True gives the last step of the warm-up the full value already, as
    `np.linspace` in DINO, DINOv2, DINOv3 and SwAV; by default the step after it is the
    first to have it, as in SimCLR, BYOL, MoCo v3, Barlow Twins and VICReg.
  zero_until: a position before which the value is 0 (DINOv2's last layer).
  every: the value changes every so many steps only (MoCo v2 and DINO's temperature:
    once an epoch).

and a line or a cosine `until`, the position where it reaches `end` (1.0); it keeps it
from there on.
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp

from clj.cli import UserError

Schedule = Callable[[Any], jax.Array]
Position = int | float

KEYS = {
  "constant": ("value",),
  "linear": ("start", "end"),
  "cosine": ("start", "end"),
  "steps": ("values", "at"),
}
WARMUP = ("warmup_steps", "warmup_fraction", "warmup_start", "warmup_endpoint")
OPTIONAL = (*WARMUP, "zero_until", "every")


def make(description: float | Mapping, total_steps: int) -> Schedule:
  """Description of a config -> function of the step; see the head of this file.

  Raises ValueError for an unknown, missing or unfitting key.
  """
  if not isinstance(description, Mapping):
    return constant(number(description, "a schedule"))
  given = dict(description)
  _check_keys(given)
  name, every = given["name"], given.get("every", 1)
  if not isinstance(every, Integral) or every < 1:
    raise UserError(f"every={every!r}: give a number of steps, at least 1")
  warm = warmup_length(
    total_steps, given.get("warmup_steps", 0), given.get("warmup_fraction", 0.0)
  )
  if name == "constant":
    peak = number(given["value"], "value")
    schedule = constant(peak)
  elif name == "steps":
    values = [number(v, "values") for v in given["values"]]
    at = [position(p, total_steps, "at") for p in given["at"]]
    schedule = steps(values, [p - warm for p in at])
    peak = values[sum(p <= warm for p in at)]
  else:
    peak = number(given["start"], "start")
    end = number(given["end"], "end")
    until = position(given.get("until", 1.0), total_steps, "until")
    if until < warm:
      raise UserError(f"until step {until}, but the warm-up takes {warm}: lengthen it")
    schedule = {"linear": linear, "cosine": cosine}[name](peak, end, until - warm)
  if warm:
    start = number(given.get("warmup_start", 0.0), "warmup_start")
    reached = warm - every if given.get("warmup_endpoint", False) else warm
    schedule = warmup(schedule, warm, start, peak, reached)
  if every > 1:
    schedule = staircase(schedule, every)
  if given.get("zero_until"):
    zero = position(given["zero_until"], total_steps, "zero_until")
    schedule = zero_until(schedule, zero)
  return schedule


def constant(value: float) -> Schedule:
  """The same value at every step."""
  return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def linear(start: float, end: float, steps: int) -> Schedule:
  """A line from `start` at step 0 to `end` at step `steps`, constant outside."""
  return lambda step: start + (end - start) * _share(step, steps)


def cosine(start: float, end: float, steps: int) -> Schedule:
  """Half a cosine from `start` at step 0 to `end` at `steps`, constant outside."""

  def schedule(step):
    falling = 0.5 * (1 + jnp.cos(jnp.pi * _share(step, steps)))
    return end + (start - end) * falling

  return schedule


def steps(values: Sequence[float], at: Sequence[int]) -> Schedule:
  """`values[0]` before step `at[0]`, `values[i]` from step `at[i - 1]` on."""
  if len(values) != len(at) + 1:
    raise UserError(
      f"{len(values)} values, {len(at)} positions: give one position less than values"
    )
  if list(at) != sorted(at):
    raise UserError(f"positions at={tuple(at)}: give them in ascending order")

  def schedule(step):
    value = constant(values[0])(step)
    for position, after in zip(at, values[1:], strict=True):
      value = jnp.where(jnp.asarray(step) >= position, jnp.float32(after), value)
    return value

  return schedule


def warmup(
  schedule: Schedule, steps: int, start: float, peak: float, reached: int | None = None
) -> Schedule:
  """`schedule`, begun after `steps` steps of a line from `start` to `peak`.

  reached: the step at which the line is at `peak`: `steps` by default, which is the
    first step of `schedule`; or the last one of the warm-up, `steps - 1`.
  """
  line = linear(start, peak, steps if reached is None else reached)

  def warmed(step):
    step = jnp.asarray(step)
    return jnp.where(step < steps, line(step), schedule(step - steps))

  return warmed


def zero_until(schedule: Schedule, begin: int) -> Schedule:
  """0 before the step `begin`, and `schedule` as it stands from there on."""
  return lambda step: jnp.where(jnp.asarray(step) < begin, 0.0, schedule(step))


def staircase(schedule: Schedule, every: int) -> Schedule:
  """The value of `schedule` at the last multiple of `every`."""
  return lambda step: schedule(jnp.asarray(step) // every * every)


def product(*factors: float | Schedule) -> float | Schedule:
  """Of numbers and schedules, from the left: a number if all of them are."""
  result = factors[0]
  for factor in factors[1:]:
    result = _times(result, factor)
  return result


def _times(a, b):
  if not callable(a) and not callable(b):
    return a * b
  of = lambda x, step: x(step) if callable(x) else x
  return lambda step: of(a, step) * of(b, step)


def _share(step, steps):
  """How much of `steps` is done, in [0, 1]. Steps are subtracted before as integers,
  so that nothing is lost at large ones."""
  return jnp.clip(jnp.asarray(step).astype(jnp.float32) / max(steps, 1), 0.0, 1.0)


def position(value: Position, total_steps: int, what: str) -> int:
  """The step meant by an int, a number of steps, or a float, a share of the run."""
  value = number(value, what)
  share = not isinstance(value, Integral)
  if not 0 <= value <= (1 if share else total_steps):
    raise UserError(
      f"{what}={value!r}: give an int, steps of total_steps={total_steps}, or a float "
      "in [0, 1], a share of them"
    )
  return round(value * total_steps) if share else value


def warmup_length(total_steps: int, steps: int, fraction: float) -> int:
  """Steps of the warm-up, given as such or as a share of the run."""
  if steps and fraction:
    raise UserError(
      f"warmup_steps={steps} and warmup_fraction={fraction}: give only one of them"
    )
  length = steps or round(fraction * total_steps)
  if not 0 <= length <= total_steps:
    raise UserError(
      f"warm-up of {length} steps in total_steps={total_steps}: shorten it"
    )
  return length


def number(value, what):
  if isinstance(value, bool) or not isinstance(value, Real):
    raise UserError(f"{what}={value!r}: give a number")
  return value


def _check_keys(given):
  name = given.get("name")
  if name not in KEYS:
    raise UserError(f"schedule {name!r}: use one of {', '.join(KEYS)}")
  required = KEYS[name]
  known = ("name", *required, *OPTIONAL)
  if "end" in required:
    known = (*known, "until")
  for key in given:
    if key not in known:
      raise UserError(
        f"schedule {name!r} has no key {key!r}; it has {', '.join(known)}"
      )
  for key in required:
    if key not in given:
      raise UserError(f"schedule {name!r} needs {key!r}; it has {', '.join(given)}")
  if not (given.get("warmup_steps") or given.get("warmup_fraction")):
    for key in ("warmup_start", "warmup_endpoint"):
      if given.get(key):
        raise UserError(
          f"{key}={given[key]!r} without a warm-up: give warmup_steps or "
          "warmup_fraction too"
        )
