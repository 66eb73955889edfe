"""Checkpoints: nothing damaged is ever restored, nothing good is lost."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from clj import sharding
from clj.runs.checkpoint import CheckpointError, Checkpoints


def make_state(value, devices=8):
  mesh = sharding.make_mesh(data=1, fsdp=-1, devices=jax.devices()[:devices])
  rules = (("w", ("fsdp", None)),)
  state = {
    "w": jnp.full((16, 8), value, jnp.float32) + jnp.arange(8.0)[None],
    "step": jnp.int32(value),
    "rng": jax.random.key(value),
    "none": {},
  }
  return jax.device_put(state, sharding.state_shardings(state, mesh, rules))


def abstract(state):
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(struct, state)


def write(directory, steps=(1, 2), **kwargs):
  checkpoints = Checkpoints(directory, **kwargs)
  for step in steps:
    checkpoints.save(step, make_state(step), {"seconds": 0.5}, {})
  checkpoints.close()


def files(directory):
  return sorted(p for p in directory.rglob("*") if p.is_file())


def test_round_trip_on_another_number_of_devices(tmp_path):
  write(tmp_path)
  for devices in (1, 2, 4, 8):
    like = abstract(make_state(0, devices))
    state, clock, step = Checkpoints(tmp_path).restore(like)
    assert step == 2 and clock == {"seconds": 0.5}
    expected = make_state(2, devices)
    np.testing.assert_array_equal(state["w"], expected["w"])
    assert state["w"].sharding == expected["w"].sharding
    assert jnp.array_equal(
      jax.random.key_data(state["rng"]), jax.random.key_data(expected["rng"])
    )


def test_a_relative_workdir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write("runs/demo")
  assert Checkpoints("runs/demo").restore(abstract(make_state(0)))[2] == 2
  assert (tmp_path / "runs" / "demo" / "checkpoints" / "2").exists()


def test_no_checkpoint_is_none_and_reading_creates_nothing(tmp_path):
  assert Checkpoints(tmp_path).restore(abstract(make_state(0))) is None
  assert not list(tmp_path.iterdir())


def damage_truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path):
  path.write_bytes(b"")


def damage_flip(path):
  data = bytearray(path.read_bytes())
  bit = np.random.default_rng(len(data)).integers(8 * len(data))
  data[bit // 8] ^= 1 << (bit % 8)
  path.write_bytes(data)


def damage_remove(path):
  path.unlink()


@pytest.mark.parametrize(
  "damage", [damage_truncate, damage_empty, damage_flip, damage_remove]
)
def test_damage_to_any_file_falls_back_in_one_line(tmp_path, damage, capfd):
  write(tmp_path / "good")
  count = len(files(tmp_path / "good" / "checkpoints" / "2"))
  for i in range(count):
    run = tmp_path / str(i)
    os.system(f"cp -r {tmp_path / 'good'} {run}")
    victim = files(run / "checkpoints" / "2")[i]
    if damage is not damage_remove and not victim.stat().st_size:
      continue
    damage(victim)
    capfd.readouterr()
    state, _, step = Checkpoints(run).restore(abstract(make_state(0)))
    out, err = capfd.readouterr()
    assert step == 1, victim
    np.testing.assert_array_equal(state["w"], make_state(1)["w"])
    assert len(out.splitlines()) == 1 and err == "", victim
    assert "checkpoint 2 is damaged" in out
    assert (run / "damaged" / "2").exists()


def test_damaged_hashes_fall_back_and_missing_hashes_do_not(tmp_path):
  write(tmp_path / "a")
  damage_flip(tmp_path / "a" / "hashes" / "2.0.json")
  assert Checkpoints(tmp_path / "a").restore(abstract(make_state(0)))[2] == 1
  # Killed between commit and hashing: the checkpoint itself is whole.
  write(tmp_path / "b")
  (tmp_path / "b" / "hashes" / "2.0.json").unlink()
  assert Checkpoints(tmp_path / "b").restore(abstract(make_state(0)))[2] == 2


def test_nothing_intact_is_an_error_and_nothing_is_deleted(tmp_path):
  write(tmp_path)
  for step in ("1", "2"):
    damage_flip(files(tmp_path / "checkpoints" / step / "state")[-1])
  with pytest.raises(CheckpointError, match="no intact checkpoint") as error:
    Checkpoints(tmp_path).restore(abstract(make_state(0)))
  assert "\n" not in str(error.value)
  assert (tmp_path / "damaged" / "1").exists() and (tmp_path / "damaged" / "2").exists()


def test_rolling_and_best_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2, best=("eval/knn/top1", 1))
  for step, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], 1):
    checkpoints.save(step, make_state(step), {}, {"eval/knn/top1": score})
    checkpoints.wait()
  checkpoints.close()
  assert checkpoints.steps() == [2, 4, 5]
  hashed = {int(p.name.split(".")[0]) for p in (tmp_path / "hashes").iterdir()}
  # Hashes of what was deleted go with the next save.
  assert {2, 4, 5} <= hashed and 1 not in hashed


def test_a_save_does_not_ask_whether_to_stop(tmp_path, monkeypatch):
  """Only the loop may: its moments are counted, and Orbax's would be others."""
  asked = []
  name = "reached_preemption_sync_point"
  monkeypatch.setattr(multihost_utils, name, lambda step: asked.append(step))
  ocp.utils.reached_preemption(3)
  assert asked == [3]  # so Orbax would ask
  write(tmp_path)
  assert asked == [3]


def test_asking_for_a_step_that_is_not_there_says_which_are(tmp_path):
  write(tmp_path)
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 7.*\[1, 2\]"):
    Checkpoints(tmp_path).restore(abstract(make_state(0)), step=7)


def test_a_state_can_be_read_without_knowing_its_structure(tmp_path):
  write(tmp_path)
  tree = Checkpoints(tmp_path).restore_tree(2)
  np.testing.assert_array_equal(tree["w"], make_state(2)["w"])


def test_only_the_parts_that_are_asked_for_are_read(tmp_path, monkeypatch):
  values = {part: {"w": jnp.full((64, 4), i, jnp.float32)} for i, part in
            enumerate(("params", "extra", "opt_state"))}  # fmt: skip
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, values, {}, {})
  checkpoints.close()
  read, deserialize = [], ocp.type_handlers.ArrayHandler.deserialize

  async def spy(self, infos, args=None):
    read.extend(info.name for info in infos)
    return await deserialize(self, infos, args)

  monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", spy)
  mesh = sharding.make_mesh(data=1, fsdp=8)
  rules = (("params/w", ("fsdp", None)),)
  tree = Checkpoints(tmp_path).restore_tree(
    1,
    lambda name, leaf: jax.sharding.NamedSharding(
      mesh, sharding.spec(leaf, name, 8, rules)
    ),
    parts=("params", "extra"),
  )
  assert sorted(read) == ["extra.w", "params.w"] and sorted(tree) == ["extra", "params"]
  np.testing.assert_array_equal(tree["extra"]["w"], values["extra"]["w"])
  assert tree["params"]["w"].addressable_shards[0].data.shape == (8, 4)
  read.clear()
  assert "opt_state" in Checkpoints(tmp_path).restore_tree(1) and len(read) == 3
