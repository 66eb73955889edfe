"""Workdirs in a bucket: gcsfs, Orbax and TensorStore against one that is faked."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from PIL import Image

from clj.data import DataError, Want, ingest, open_source
from clj.evals.load import load
from clj.runs import checkpoint, log, workdir
from clj.train import train
from configs import simclr
from tests import fake_gcs

needs_gcsfs = pytest.mark.skipif(
  importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed"
)


@pytest.fixture
def bucket(monkeypatch):
  with fake_gcs.serve() as (bucket, environment):
    for key, value in environment.items():
      monkeypatch.setenv(key, value)
    yield bucket


def smoke(**changes):
  config = simclr.get_config("smoke").to_dict()
  return config | {"log_every": 1, "checkpoint_every": 2, "evals": {}} | changes


def lines(directory):
  return [(m["step"], m.get("train/loss")) for m in log.read_metrics(directory)]


def state_of(directory, step):
  tree = checkpoint.Checkpoints(directory).restore_tree(step)
  tree["rng"] = jax.random.key_data(tree["rng"])
  return jax.tree.map(np.asarray, tree)


@pytest.mark.slow
@needs_gcsfs
def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, tmp_path, capfd):
  directory = "gs://bucket/runs/one"
  assert train(directory, **smoke(total_steps=4)) == 0
  assert train(tmp_path, **smoke(total_steps=4)) == 0
  assert lines(directory) == lines(tmp_path) and len(lines(directory)) == 4
  jax.tree.map(
    np.testing.assert_array_equal, state_of(directory, 4), state_of(tmp_path, 4)
  )
  names = set(bucket.objects)
  assert any(name.startswith("runs/one/tensorboard/events") for name in names)
  assert json.loads(bucket.objects["runs/one/config.json"])[0]["step"] == 0
  assert {"runs/one/hashes/2.0.json", "runs/one/hashes/4.0.json"} <= names
  # Files that grow are uploaded whole: at each checkpoint and at the end.
  assert bucket.written["runs/one/metrics.jsonl"] == 3
  assert bucket.objects["runs/one/metrics.jsonl"].count(b"\n") == 4
  assert load(directory).step == 4

  # Damage is noticed there too, and the run goes on from the checkpoint before.
  victim = max(n for n in names if "/checkpoints/4/state/" in n and "/d/" in n)
  data = bytearray(bucket.objects[victim])
  data[len(data) // 2] ^= 4
  bucket.write(victim, bytes(data))
  capfd.readouterr()
  assert train(directory, **smoke(total_steps=4)) == 0
  out, _ = capfd.readouterr()
  assert "checkpoint 4 is damaged" in out and "going on from step 2 of 4" in out
  assert any(name.startswith("runs/one/damaged/4/") for name in bucket.objects)
  assert lines(directory) == lines(tmp_path)
  jax.tree.map(
    np.testing.assert_array_equal, state_of(directory, 4), state_of(tmp_path, 4)
  )


@needs_gcsfs
def test_tfds_data_in_a_bucket_are_those_on_a_disk(bucket, tmp_path):
  rng = np.random.default_rng(0)
  for kind in ("one", "two"):
    (tmp_path / "in" / kind).mkdir(parents=True)
    for i in range(20):  # of two sizes, so that they are read one by one
      image = Image.fromarray(rng.integers(0, 256, (40, 40 + i % 2, 3), np.uint8))
      image.save(tmp_path / "in" / kind / f"{i}.png")
  local = tmp_path / "tfds" / "pictures"
  ingest.ingest(str(tmp_path / "in"), str(local), shard_records=16)
  for file in local.rglob("*"):
    if file.is_file():
      bucket.write(str(file.relative_to(tmp_path)), file.read_bytes())
  wants = {"image": Want("image", "image"), "label": Want("label", "label")}
  source = lambda where: open_source("pictures", "train[10%:]", where, wants=wants)
  ours, theirs = source("gs://bucket/tfds"), source(str(tmp_path / "tfds"))
  assert len(ours) == 36 and ours.class_names == {"label": ("one", "two")}
  assert ours.read(range(36)) == theirs.read(range(36))
  shard = next(name for name in bucket.objects if "array_record-00001" in name)
  del bucket.objects[shard]
  with pytest.raises(DataError, match=f"lacks the file gs://bucket/{shard}"):
    source("gs://bucket/tfds")


def test_a_missing_package_is_one_line(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="needs the package gcsfs: pip install gcsfs"):
    workdir.read_config("gs://bucket/run")
  with pytest.raises(ValueError, match="no storage 'ftp'"):
    workdir.read_config("ftp://host/run")
