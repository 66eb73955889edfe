"""A run at work without its training: split, without its optimiser, evaluated alone."""

import jax
import numpy as np
import pytest

import clj
from clj import evaluate, sharding
from clj.evals.embedder import programs
from clj.index import build
from clj.runs import checkpoint
from configs import clip
from tests.written_run import PAIRS, write_run

EVALS = {
  "zeroshot": {"templates": ("a {}",)},
  "retrieval": {"data": {"source": PAIRS["source"], "test_split": "test[:40]",
                         "columns": {"text": {"field": "caption"}}}},
  "diagnostics": {},
}  # fmt: skip


TWO_VIEWS = PAIRS | {"augment": {"image": PAIRS["augment"]["image"] | {"views": 2}}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  config = clip.get_config("smoke").to_dict() | {"evals": EVALS}
  return write_run(tmp_path_factory.mktemp("run"), config, PAIRS)


def test_a_run_is_loaded_split_and_without_its_optimiser(run, monkeypatch):
  """What needs fsdp is evaluated and embedded without being whole on one device."""
  read, restore = [], checkpoint.Checkpoints.restore_tree

  def spy(self, step, make_sharding=None, parts=None):
    read.append(parts)
    return restore(self, step, make_sharding, parts)

  monkeypatch.setattr(checkpoint.Checkpoints, "restore_tree", spy)
  monkeypatch.setattr(sharding, "SMALL", 64)
  mesh = sharding.make_mesh(2, 4)
  with jax.set_mesh(mesh):
    model = clj.load(run, mesh=mesh)
    batch = jax.device_put(
      {"image": np.random.default_rng(0).random((8, 1, 32, 32, 3), np.float32)},
      sharding.batch_sharding(mesh),
    )
    embed = programs(model.embed).embed
    z = embed(model.params, model.extra, batch, ("image",))["image"]
  assert read == [("params", "extra")]
  kernel = model.params["image_head"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  whole = clj.load(run)
  expected = whole.embed(whole.params, whole.extra, jax.device_get(batch))["image"]
  np.testing.assert_allclose(z, expected, atol=1e-4)
  assert build.fingerprint(model) == build.fingerprint(whole)


def test_evaluation_alone_is_the_same_however_the_run_is_split(
  run, tmp_path, monkeypatch, capsys
):
  tables = []
  for name, fsdp in (("whole", 1), ("split", 4)):
    config = clip.get_config("smoke").to_dict() | {"evals": EVALS}
    config["mesh"] = {"data": -1, "fsdp": fsdp}
    monkeypatch.setattr(sharding, "SMALL", 64)
    directory = write_run(tmp_path / name, config, TWO_VIEWS)
    assert evaluate.main([f"--workdir={directory}"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == f"{directory}, step 0"
    tables.append({line.split()[0]: line.split()[1] for line in lines})
  whole, split = tables
  assert (
    whole.keys()
    == split.keys()
    >= {
      *("zeroshot/top1", "retrieval/image_to_text/recall@10"),
      *("diagnostics/alignment", "retrieval/text_to_image/untrained@10"),
    }
  )
  for key in list(whole)[2:]:
    assert float(whole[key]) == pytest.approx(float(split[key]), abs=0.02), key
  arguments = [f"--workdir={directory}", "--evals=zeroshot"]
  assert evaluate.main(arguments) == 0
  assert "retrieval" not in capsys.readouterr().out


def test_what_is_wrong_is_said_in_a_line(run, capsys):
  for arguments, line in (
    ([f"--workdir={run}", "--evals=nearest"], "no evaluation 'nearest'"),
    ([f"--workdir={run}", "--step=77"], "no checkpoint of step 77"),
    (["--workdir=/none"], "/none is not the workdir of a run"),
  ):
    assert evaluate.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and line in error[0], error


def test_a_vocabulary_that_was_exchanged_is_refused(tmp_path):
  config = clip.get_config("smoke").to_dict()
  directory = write_run(tmp_path / "run", config, PAIRS)
  other = PAIRS | {"train_split": "train[:3]"}
  write_run(tmp_path / "other", config, other)
  (directory / "tokenizer").rename(directory / "old")
  (tmp_path / "other" / "tokenizer").rename(directory / "tokenizer")
  with pytest.raises(ValueError, match="trained with another vocabulary"):
    clj.load(directory)
