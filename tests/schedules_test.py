"""Schedules against the official ones, float64 twins, and at large steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clj import schedules


@pytest.fixture(scope="module")
def golden(golden_file):
  return np.load(golden_file("schedules.npz"))


# By array of the file: the description, as a function of the file, and the steps.
OFFICIAL = {
  "byol_tau": lambda g: (cosine(g["byol_base_ema"], 1.0), 40),
  "byol_lr": lambda g: (cosine(2 * g["byol_base_lr"], 0.0, warmup_steps=8), 40),
  "simclr_lr": lambda g: (cosine(0.3 * 100 / 256, 0.0, warmup_steps=10), 41),
  "dino_lr": lambda g: (cosine(1e-3, 1e-6, warmup_steps=10, warmup_endpoint=True), 40),
  "dino_weight_decay": lambda g: (cosine(g["dino_wd"], g["dino_wd_end"]), 40),
  "dino_momentum": lambda g: (cosine(g["dino_momentum_base"], 1.0), 40),
  "dinov2_lr": lambda g: (
    cosine(g["dinov2_lr_scaled"], 1e-6, warmup_fraction=0.25, warmup_endpoint=True),
    40,
  ),
  "dinov2_weight_decay": lambda g: (cosine(0.04, 0.4), 40),
  "dinov2_momentum": lambda g: (cosine(g["dinov2_momentum_base"], 1.0), 40),
  "dinov2_teacher_temp": lambda g: (
    {
      "name": "constant",
      "value": 0.07,
      "warmup_steps": 15,
      "warmup_start": 0.04,
      "warmup_endpoint": True,
    },
    40,
  ),
  "dinov2_last_layer_lr": lambda g: (
    cosine(
      g["dinov2_lr_scaled"],
      1e-6,
      warmup_steps=10,
      warmup_endpoint=True,
      zero_until=0.125,
    ),
    40,
  ),
  "mocov3_momentum": lambda g: (cosine(0.99, 1.0), 40),
  "mocov3_lr": lambda g: (cosine(g["mocov3_lr_base"], 0.0, warmup_steps=10), 40),
  "swav_lr": lambda g: (
    cosine(4.8, 0.0048, warmup_steps=10, warmup_start=0.3, warmup_endpoint=True),
    40,
  ),
  "barlow_lr_weights": lambda g: (cosine(0.4, 0.4e-3, warmup_steps=30), 42),
  "barlow_lr_biases": lambda g: (cosine(0.0096, 0.0096e-3, warmup_steps=30), 42),
  "vicreg_lr": lambda g: (cosine(0.4, 0.4e-3, warmup_steps=30), 42),
}


def cosine(start, end, **options):
  return {"name": "cosine", "start": float(start), "end": float(end), **options}


def values(description, total_steps, steps):
  return schedules.make(description, total_steps)(jnp.asarray(steps))


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_schedules(name, golden):
  g = golden
  description, total_steps = OFFICIAL[name](g)
  found = values(description, total_steps, np.arange(len(g[name])))
  assert found.dtype == jnp.float32 and not found.weak_type
  np.testing.assert_allclose(found, g[name], rtol=2e-6, atol=1e-7)


def test_official_schedule_that_changes_once_an_epoch(golden):
  g = golden
  description = {"name": "constant", "value": 0.07, "every": 5, "warmup_steps": 15}
  description |= {"warmup_start": 0.04, "warmup_endpoint": True}
  expected = np.repeat(g["dino_teacher_temp_per_epoch"], 5)
  np.testing.assert_allclose(values(description, 40, np.arange(40)), expected, 1e-6)


def test_official_frozen_prototypes(golden):
  g = golden
  begin = int(g["swav_freeze_prototypes_niters"])
  found = values({"name": "constant", "value": 1.0, "zero_until": begin}, 40, range(40))
  np.testing.assert_array_equal(found == 0, g["swav_prototypes_frozen"])


def test_steps_and_lines():
  step = {"name": "steps", "values": (3, 0.3, 0.03), "at": (0.6, 8)}
  np.testing.assert_allclose(
    values(step, 10, range(10)), [3] * 6 + [0.3] * 2 + [0.03] * 2, rtol=1e-6
  )
  warm = step | {"warmup_steps": 2, "warmup_start": 1.0}
  np.testing.assert_allclose(values(warm, 10, range(3)), [1, 2, 3], rtol=1e-6)
  line = {"name": "linear", "start": 1.0, "end": 0.5}
  np.testing.assert_allclose(values(line, 10, [0, 4, 10, 99]), [1, 0.8, 0.5, 0.5])
  short = line | {"until": 0.6, "warmup_steps": 2}
  np.testing.assert_allclose(
    values(short, 10, [0, 1, 2, 4, 6, 9]), [0, 0.5, 1, 0.75, 0.5, 0.5]
  )
  stairs = line | {"every": 4}
  np.testing.assert_allclose(values(stairs, 10, [3, 4, 7, 8]), [1, 0.8, 0.8, 0.6])
  np.testing.assert_array_equal(values(0.25, 10, [[0, 7]]), [[0.25, 0.25]])


@pytest.mark.parametrize("total_steps", [10**6, 10**9])
def test_large_steps_against_float64(total_steps):
  warm = total_steps // 10 + 1
  rng = np.random.default_rng(0)
  steps = rng.integers(0, total_steps, 1000)
  edges = [0, 1, warm - 1, warm, warm + 1, total_steps - 1, total_steps]
  steps = np.concatenate([steps, edges])
  description = cosine(0.992, 1.0, warmup_steps=warm, warmup_start=0.5)
  found = jax.jit(schedules.make(description, total_steps))(steps.astype(np.int32))
  share = (steps - warm) / (total_steps - warm)
  expected = 1 + (0.992 - 1) * 0.5 * (1 + np.cos(np.pi * share))
  line = 0.5 + (0.992 - 0.5) * steps / warm
  expected = np.where(steps < warm, line, expected)
  np.testing.assert_allclose(found, expected, rtol=2e-7)
  first = {"name": "constant", "value": 1.0, "zero_until": total_steps - 1}
  last = schedules.make(first, total_steps)
  assert (last(total_steps - 2), last(total_steps - 1)) == (0, 1)


@pytest.mark.parametrize(
  ("description", "message"),
  [
    ("cosine", "'cosine': give a number"),
    ({"start": 1.0}, "schedule None: use one of constant, linear, cosine, steps"),
    ({"name": "cosin"}, "'cosin': use one of"),
    ({"name": "cosine", "start": 1.0}, "needs 'end'"),
    (cosine(1, 0, stop=3), "no key 'stop'; it has name, start, end, warmup_steps"),
    (cosine(1, 0, warmup_steps=11), "11 steps in total_steps=10"),
    (cosine(1, 0, warmup_steps=1, warmup_fraction=0.1), "give only one"),
    (cosine(1, 0, warmup_start=0.1), "warmup_start=0.1 without a warm-up"),
    (cosine(1, 0, zero_until=1.5), "zero_until=1.5: give an int"),
    (cosine(1, 0, until=11), "until=11: give an int"),
    (cosine(1, 0, until=2, warmup_steps=3), "until step 2, but the warm-up takes 3"),
    (cosine(1, 0, every=0.5), "every=0.5: give a number of steps"),
    ({"name": "constant", "value": True}, "value=True: give a number"),
    ({"name": "steps", "values": (1, 2), "at": ()}, "2 values, 0 positions"),
    ({"name": "steps", "values": (1, 2, 3), "at": (5, 4)}, "in ascending order"),
    ({"name": "constant", "value": 1.0, "until": 3}, "no key 'until'"),
  ],
)
def test_errors_name_the_value(description, message):
  with pytest.raises(ValueError, match=message):
    schedules.make(description, 10)
