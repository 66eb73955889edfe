"""Texts, arrays and pictures alone: methods that exist only here, by every entry point.

Such a method is a file (`text_pairs_method`), a line in METHODS (`own_methods` here,
`run_with_method` for processes) and a config (`modalities_config`), no more.
"""

import csv
import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clj import embed, evaluate, main, methods, plan, search, sharding, train
from clj.cli import read_config
from clj.data import expected_spec, open_data
from clj.index import build, find, store
from clj.method import Method
from clj.runs import log
from tests import run_with_method
from tests.pods_test import assert_close, free_port, values_of
from tests.train_test import final_state, wait_for
from tests.written_run import PAIRS as PAIRS_OF_SHAPES
from tests.written_run import write_run

CONFIG = "--config=tests/modalities_config.py"
WORDS = [f"{a}{b}" for a in ("ba", "ko", "ti", "mu", "re") for b in ("ri", "ga", "du")]
PAIRS, PHOTOGRAPHS = 200, 40


@pytest.fixture(autouse=True)
def own_methods(monkeypatch):
  for name, make in run_with_method.OWN.items():
    monkeypatch.setitem(methods.METHODS, name, make)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """A table of queries and their translations, in another order; its rows."""
  rng, rows = np.random.default_rng(0), []
  for _ in range(PAIRS):
    said = rng.choice(WORDS, 3, replace=False)
    rows.append(
      (" ".join(said), " ".join(f"{w[::-1]}o" for w in rng.permutation(said)))
    )
  path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
  with open(path, "w", newline="") as file:
    csv.writer(file).writerows([("query", "passage"), *rows])
  return path, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Photographs of several sizes, of no class."""
  root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(1)
  for i in range(PHOTOGRAPHS):
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
    coarse.resize((90 + i, 100)).save(root / f"{i:02d}.png")
  return root


@pytest.fixture(scope="module")
def motions(tmp_path_factory):
  """Signals [n, 6] of 9 to 40 samples, of two activities along different axes."""
  import pyarrow
  from pyarrow import parquet

  rng = np.random.default_rng(2)
  labels, axes = ["walk", "rest"] * 40, np.arange(6) < 3
  lengths = rng.integers(9, 41, len(labels))
  arrays = [
    (rng.normal(size=(n, 6)) * (0.1 + (axes == (label == "walk")))).tolist()
    for n, label in zip(lengths, labels)
  ]
  path = tmp_path_factory.mktemp("motions") / "motions.parquet"
  kind = pyarrow.list_(pyarrow.list_(pyarrow.float32()))
  table = pyarrow.table(
    {"signal": pyarrow.array(arrays, kind), "activity": pyarrow.array(labels)}
  )
  parquet.write_table(table, path)
  return path


def flags(variant, source, *more):
  return [f"{CONFIG}:{variant}", f"--config.data.source={source}", *more]


def ran(entry, arguments, capsys):
  """What an entry point says, that ends well."""
  code = entry.main([str(x) for x in arguments])
  said = capsys.readouterr()
  assert code == 0, said.err
  return said.out


def failing(entry, arguments, capsys):
  """The one line of an entry point that does not."""
  assert entry.main([str(x) for x in arguments]) == 1
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1, lines
  return lines[0]


def failing_last(entry, arguments, capsys):
  """The last line of one that says on the way what it is at."""
  assert entry.main([str(x) for x in arguments]) == 1
  return capsys.readouterr().err.splitlines()[-1]


def start(module, *arguments, devices=8):
  env = os.environ | {
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  }
  return subprocess.Popen(
    [sys.executable, "-m", "tests.run_with_method", module, *map(str, arguments)],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


# Texts.


@pytest.fixture(scope="module")
def text_run(pairs, tmp_path_factory):
  """A run of the text pairs, in this process."""
  directory = tmp_path_factory.mktemp("run") / "texts"
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "text_pairs", run_with_method.OWN["text_pairs"])
    arguments = [*flags("text_pairs", f"csv:{pairs[0]}"), f"--workdir={directory}"]
    assert main.main(arguments) == 0
  return directory


def test_text_pairs_learn_and_are_evaluated(text_run, capsys):
  first, last = (values_of(text_run, step, "eval/") for step in (0, 30))
  key = "eval/retrieval/query_to_passage/recall@5"
  assert first[key] < 0.5 and last[key] > first[key] + 0.3
  assert last["eval/retrieval/records"] == PAIRS // 5
  said = ran(evaluate, [f"--workdir={text_run}"], capsys)
  (line,) = [x for x in said.splitlines() if "query_to_passage/recall@5" in x]
  assert float(line.split()[1]) == pytest.approx(last[key], abs=1e-4)


def test_a_query_finds_its_passage(pairs, text_run, tmp_path, capsys, monkeypatch):
  out = tmp_path / "index"
  arguments = [f"--workdir={text_run}", "--split=train", f"--out={out}"]
  said = ran(embed, [*arguments, "--what=passage", "--batch_size=64"], capsys)
  assert f"{PAIRS} embeddings of width 8" in said
  monkeypatch.chdir(tmp_path)
  queries = [f"--text={query}" for query, _ in pairs[1][:8]]
  looked = [f"--index={out}", *queries, "--k=20", "--column=query"]
  found = json.loads(ran(search, [*looked, "--json"], capsys))
  near = [{row["captions"][0] for row in each["results"]} for each in found]
  assert sum(passage in them for (_, passage), them in zip(pairs[1], near)) >= 6
  assert "pictures" not in ran(search, looked, capsys)
  assert os.listdir(tmp_path) == ["index"]  # there is nothing to draw
  line = failing(search, [f"--index={out}", "--text=x", "--column=image"], capsys)
  assert line == "clj: --column=image: the columns of texts are passage, query"
  line = failing(embed, [*arguments[:2], f"--out={tmp_path}/o", "--what=text"], capsys)
  assert line == "clj: --what=text: there are passage, query"


def test_a_text_goes_through_the_tower_of_its_column(tmp_path):
  """Of two towers that differ, whichever name comes first."""
  run = tmp_path / "run"
  column = {"kind": "text", "tokenizer": "words", "length": 8, "field": "caption"}
  data = {
    **PAIRS_OF_SHAPES,
    "columns": {"a": column, "b": {**column, "length": 9}},
    "augment": {},
  }
  towers = {"a": jnp.array([[1.0], [0.0]]), "b": jnp.array([[0.0], [1.0]])}

  def encode(params, extra, batch):
    of = lambda name: batch[f"{name}_mask"].sum(1, keepdims=True) @ jnp.ones((1, 2))
    return {n: of(n) * params[n].T for n in towers if n in batch}

  own = Method(lambda *_: (towers, {}), None, None, encode, ())
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "towers", lambda model, total_steps: own)
    config = read_config(flags("signals", "shapes"))[0] | {"method": {"name": "towers"}}
    write_run(run, config, data, own)
    build.build(run, str(tmp_path / "index"), what="b", split="test[:5]")
    made = store.open_index(str(tmp_path / "index"))
    model = find.open_model(made)
    for name, expected in (("", [1, 0]), ("a", [1, 0]), ("b", [0, 1])):
      (z,) = find.embed_queries(made, model, ["a red star"], [], name)
      np.testing.assert_allclose(z, expected, atol=1e-6)


def test_text_pairs_are_planned(pairs, capsys):
  arguments = flags("text_pairs", f"csv:{pairs[0]}", "--topology=local", "--json")
  found = json.loads(ran(plan, arguments, capsys))
  assert found["fits"] and found["batch_size"] == 16 and found["devices"] == 8
  # The data need not be there.
  elsewhere = flags("text_pairs", "csv:/nowhere.csv", "--topology=local", "--json")
  assert json.loads(ran(plan, elsewhere, capsys))["flops"] == found["flops"]


def test_killed_text_pairs_go_on_bit_for_bit(pairs, text_run, tmp_path):
  arguments = [*flags("text_pairs", f"csv:{pairs[0]}"), f"--workdir={tmp_path}"]
  after = int(np.random.default_rng().integers(4, 25))
  child = start("clj.main", *arguments)
  steps = lambda: [x["step"] for x in log.read_metrics(tmp_path)]
  wait_for(lambda: max(steps(), default=0) >= after, child)
  child.send_signal(signal.SIGKILL)
  child.communicate()
  assert main.main(arguments) == 0
  expected_step, expected = final_state(text_run)
  step, state = final_state(tmp_path)
  assert step == expected_step == 30
  for path, value in expected.items():
    np.testing.assert_array_equal(state[path], value, err_msg=f"{path}, after {after}")
  assert values_of(tmp_path, 30, "eval/") == values_of(text_run, 30, "eval/")
  losses = [[values_of(d, s, "train/loss") for s in range(31)] for d in
            (tmp_path, text_run)]  # fmt: skip
  assert losses[0] == losses[1]


def test_text_pairs_have_the_same_loss_on_any_devices(pairs):
  config, _ = read_config(flags("text_pairs", f"csv:{pairs[0]}"))
  data = open_data(config["data"])
  batches = data.batches(seed=0, batch_size=16)
  rows = [next(batches) for _ in range(3)]
  batches.close()
  found = {}
  for count in (1, 2, 8):
    mesh = sharding.make_mesh(devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
      program = train.build(
        train.batch_shapes(data, 16, mesh),
        mesh,
        augment={},
        **{k: config[k] for k in ("seed", "batch_size", "total_steps")},
        **{k: config[k] for k in ("method", "model", "optim")},
      )
      state = program.init(jax.random.key(0))
      found[count] = []
      for batch in rows:
        state, metrics = program.step(state, sharding.to_global(batch, mesh))
        found[count].append(float(metrics["loss"]))
  assert found[1][0] > 1
  np.testing.assert_allclose(found[2], found[1], rtol=1e-5)
  np.testing.assert_allclose(found[8], found[1], rtol=1e-5)


def end_both(module, *arguments):
  """An entry point in two processes of four devices; both end well."""
  address = f"127.0.0.1:{free_port()}"
  share = [f"--coordinator={address}", "--num_processes=2"]
  both = [
    start(module, *arguments, *share, f"--process_id={i}", devices=4) for i in range(2)
  ]
  said = [child.communicate(timeout=200) for child in both]
  assert [child.returncode for child in both] == [0, 0], said


@pytest.mark.slow
def test_text_pairs_in_two_processes_are_the_same(pairs, text_run, tmp_path):
  run, out = tmp_path / "run", tmp_path / "index"
  end_both("clj.main", *flags("text_pairs", f"csv:{pairs[0]}"), f"--workdir={run}")
  for step in (1, 2, 30):
    found, expected = (values_of(d, step, "train/loss") for d in (run, text_run))
    assert_close(found, expected, 1e-3 if step == 30 else 1e-5)
  assert_close(*(values_of(d, 0, "eval/") for d in (run, text_run)), 1e-6)
  share = ["--what=passage", f"--out={out}", "--rows_per_shard=16"]
  end_both("clj.embed", f"--workdir={run}", *share)
  assert json.loads((out / "index.json").read_text())["texts"] == PAIRS // 5
  assert len(list(out.glob("part-*"))) == 3


# Arrays.


def test_signals_of_different_lengths(motions, tmp_path, capsys):
  run, out = f"--workdir={tmp_path / 'run'}", tmp_path / "index"
  recipe = flags("signals", f"parquet:{motions}")
  said = ran(main, [*recipe, run], capsys)
  assert "knn/top1" in said
  # Their axes tell the activities apart, whatever the kernel is.
  found = values_of(tmp_path / "run", 4, "eval/")
  assert found["eval/knn/top1"] > 0.9 and found["eval/knn/records"] == 16
  losses = [values_of(tmp_path / "run", s, "train/loss") for s in (1, 4)]
  assert all(np.isfinite(list(each.values())).all() for each in losses)
  said = ran(evaluate, [run, "--evals=knn"], capsys)
  assert f"{found['eval/knn/top1']:.4f}" in said
  said = ran(embed, [run, f"--out={out}", "--batch_size=8"], capsys)
  assert "16 embeddings of width 8" in said
  assert json.loads((out / "index.json").read_text())["outputs"] == {"signal": "signal"}
  line = failing(search, [f"--index={out}", "--text=walk", "--out="], capsys)
  assert "has no text tower" in line
  assert "fits" in ran(plan, [*recipe, "--topology=local"], capsys)
  config, _ = read_config(recipe)
  assert expected_spec(config["data"])["signal"].shape == (32, 6)
  nowhere = flags("signals", "parquet:/nowhere.parquet", "--topology=local")
  assert "there is no such file" in failing_last(plan, nowhere, capsys)


def test_signals_of_the_real_data(tfds_data_dir, tmp_path, capsys):
  if not os.path.isdir(os.path.join(tfds_data_dir, "hmp_imu")):
    pytest.skip(f"no hmp_imu in {tfds_data_dir}")
  changes = {
    "data.data_dir": tfds_data_dir,
    "data.train_split": "train",
    "data.test_split": "test",
    "data.columns.signal.length": 128,
    "data.columns.label.field": "label",
    "model.channels": 3,
  }
  more = [f"--config.{key}={value}" for key, value in changes.items()]
  run = f"--workdir={tmp_path / 'run'}"
  ran(main, [*flags("signals", "hmp_imu", *more), run], capsys)
  found = values_of(tmp_path / "run", 4, "eval/")
  assert found["eval/knn/records"] == 191
  assert found["eval/knn/top1"] > 2 * found.get("eval/knn/chance", 1 / 14)


# Pictures.


@pytest.fixture(scope="module")
def picture_run(folder, tmp_path_factory):
  directory = tmp_path_factory.mktemp("run") / "pictures"
  arguments = [*flags("pictures", f"folder:{folder}"), f"--workdir={directory}"]
  assert main.main(arguments) == 0
  return directory


def test_pictures_without_labels(picture_run, capsys):
  found = values_of(picture_run, 2, "eval/")
  assert found["eval/diagnostics/records"] == PHOTOGRAPHS // 5
  assert 0 <= found["eval/diagnostics/alignment"] <= 4
  run = f"--workdir={picture_run}"
  said = ran(evaluate, [run, "--evals=diagnostics"], capsys)
  assert f"{found['eval/diagnostics/feature_std']:.4f}" in said
  line = failing(evaluate, [run, "--evals=knn"], capsys)
  assert "'knn' needs 'label'" in line and "folder:" in line


@pytest.mark.slow
def test_pictures_are_found_and_planned(folder, picture_run, tmp_path, capsys):
  out = tmp_path / "index"
  arguments = [f"--workdir={picture_run}", "--split=train", f"--out={out}"]
  said = ran(embed, [*arguments, "--batch_size=8"], capsys)
  assert f"{PHOTOGRAPHS} embeddings" in said
  like = folder / "07.png"
  arguments = [f"--index={out}", f"--image={like}", "--json", f"--out={tmp_path}/a.png"]
  (one,) = json.loads(ran(search, [*arguments, "--k=3"], capsys))
  assert one["results"][0]["id"] == "07.png" and (tmp_path / "a.png").exists()
  recipe = flags("pictures", f"folder:{folder}", "--topology=local")
  assert "fits" in ran(plan, recipe, capsys)


def test_pictures_streamed_and_held_come_in_one_order(folder):
  def taken(*more):
    config, _ = read_config(flags("pictures", f"folder:{folder}", *more))
    data = open_data(config["data"])
    batches = data.batches(seed=3, batch_size=8, step=2)
    found = [next(batches) for _ in range(9)]
    batches.close()
    return data, found

  streamed, crops = taken()
  held, whole = taken("--config.data.columns.image.memory_size=48")
  assert streamed.train.held is None and held.train.held is not None
  assert crops[0]["image"].shape == (8, 2, 32, 32, 3)
  assert whole[0]["image"].shape == (8, 48, 48, 3)
  for a, b in zip(crops, whole):
    np.testing.assert_array_equal(a["index"], b["index"])
  # Crops of the same picture: their colours are near those of the picture.
  mean = lambda x: x["image"].reshape(8, -1, 3).mean(1)
  distance = np.linalg.norm(mean(crops[0])[:, None] - mean(whole[0])[None], axis=-1)
  assert (distance.argmin(1) == np.arange(8)).mean() > 0.7


def test_crops_of_two_sizes(folder, tmp_path, capsys):
  run = f"--workdir={tmp_path / 'run'}"
  recipe = flags("multi_crop", f"folder:{folder}")
  config, _ = read_config(recipe)
  batches = open_data(config["data"]).batches(seed=0, batch_size=8)
  batch = next(batches)
  batches.close()
  assert {key: x.shape for key, x in batch.items()} == {
    "index": (8,),
    "image": (8, 2, 64, 64, 3),
    "crops": (8, 6, 32, 32, 3),
  }
  said = ran(main, [*recipe, run], capsys)
  assert "step 2/2" in said and "diagnostics/alignment" in said
  (loss,) = values_of(tmp_path / "run", 2, "train/loss").values()
  assert np.isfinite(loss)
  assert "fits" in ran(plan, [*recipe, "--topology=local"], capsys)


# What is wrong is one line.


@pytest.mark.parametrize(
  "variant, change, message",
  [
    (
      "text_pairs",
      "--config.method.name=signals --config.model.channels=6",
      "method 'signals' needs signal, signal_mask in its batches; they have index, "
      "passage, passage_mask, query, query_mask: name it in data.columns",
    ),
    (
      "text_pairs",
      "--config.evals.knn.k=5",
      "evaluation 'knn' needs 'label', and csv:{} train[80%:] has none (it gives "
      "passage, query)",
    ),
    (
      "text_pairs",
      "--config.data.columns.query.lenght=8",
      "no key 'lenght' in data.columns.query; did you mean 'length'?",
    ),
    (
      "text_pairs",
      "--config.data.columns.passage.field=answer",
      "{} has no column 'answer' (data.columns.passage.field); it has: query, passage",
    ),
    ("text_pairs", "--config.model.vocab=9", "'query', but the model takes 9"),
    (
      "text_pairs",
      "--config.data.columns.passage.kind=txt",
      "data.columns.passage.kind is 'txt'; did you mean 'text'?",
    ),
    (
      "text_pairs",
      "--config.evals.retrieval.bank=answer",
      "evaluation 'retrieval': there is no 'answer' among what the model makes of",
    ),
    (
      "text_pairs",
      "--config.data.columns.query.kind=array",
      "no key 'tokenizer' in data.columns.query",
    ),
    (
      "text_pairs",
      "--config.method.widht=4",
      "no key 'widht' in method; did you mean 'width'?",
    ),
  ],
)
def test_what_is_wrong_is_one_line(variant, change, message, pairs, tmp_path, capsys):
  recipe = flags(variant, f"csv:{pairs[0]}", *change.split())
  line = failing(main, [*recipe, f"--workdir={tmp_path}"], capsys)
  assert message.format(pairs[0]) in line
  assert not log.read_metrics(tmp_path)


@pytest.mark.parametrize(
  "where, line",
  [("loss", "jnp.ones(3) * jnp.ones(4)"), ("embed", 'params["kernell"]')],
)
def test_a_slip_in_code_is_a_traceback(where, line, motions, tmp_path, capsys):
  slip = ["--config.method.name=slip_in_code", f"--config.method.where={where}"]
  recipe = flags("signals", f"parquet:{motions}", *slip)
  assert main.main([*recipe, f"--workdir={tmp_path}"]) == 1
  said = capsys.readouterr().err
  assert "Traceback" in said and "small_methods.py" in said
  assert line in said


def test_sounds_need_a_library(tmp_path, capsys, monkeypatch):
  import wave

  monkeypatch.setitem(sys.modules, "soundfile", None)
  (tmp_path / "in").mkdir()
  for i in range(4):
    with wave.open(str(tmp_path / "in" / f"{i}.wav"), "wb") as file:
      file.setparams((1, 2, 8000, 0, "NONE", ""))
      file.writeframes(bytes(1600))
  recipe = flags(
    "signals",
    f"folder:{tmp_path / 'in'}",
    "--config.data.columns={'signal': {'kind': 'audio', 'field': 'audio'}}",
    "--config.evals={}",
  )
  line = failing(main, [*recipe, f"--workdir={tmp_path / 'run'}"], capsys)
  assert line == "clj: audio is decoded by soundfile: pip install soundfile"
