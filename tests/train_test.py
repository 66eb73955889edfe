"""The loop: compiles once, resumes bit for bit, stops when told, errors in a line."""

import copy
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from clj.cli import UserError
from clj.data import text
from clj.interop import init_from
from clj.runs import checkpoint, log, workdir
from clj.train import train
from configs import simclr

STEPS = ("--config.total_steps=12", "--config.checkpoint_every=3")


def smoke(**changes):
  config = simclr.get_config("smoke").to_dict()
  return config | {"log_every": 1, "checkpoint_every": 2, "evals": {}} | changes


def command(directory, *arguments):
  return [
    sys.executable,
    "-m",
    "clj.main",
    "--config=configs/simclr.py:smoke",
    f"--workdir={directory}",
    *arguments,
  ]


def environment(tmp_path_factory):
  cache = tmp_path_factory.getbasetemp() / "child-cache"
  return os.environ | {
    "JAX_NUM_CPU_DEVICES": "2",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
  }


def final_state(directory):
  checkpoints = checkpoint.Checkpoints(directory)
  step = checkpoints.steps()[-1]
  tree = checkpoints.restore_tree(step)
  tree["rng"] = jax.random.key_data(tree["rng"])
  return step, {k: np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  directory = tmp_path_factory.mktemp("uninterrupted")
  done = subprocess.run(
    command(directory, *STEPS),
    env=environment(tmp_path_factory),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return directory


def wait_for(condition, child):
  until = time.monotonic() + 120
  while not condition():
    assert child.poll() is None, "the run ended before the moment came"
    assert time.monotonic() < until
    time.sleep(0.001)


def test_killed_runs_resume_bit_for_bit(uninterrupted, tmp_path, tmp_path_factory):
  rng = np.random.default_rng()
  after = int(rng.integers(4, 9))
  env = environment(tmp_path_factory)

  def reached():
    return any(m["step"] >= after for m in log.read_metrics(tmp_path))

  def saving():
    directory = tmp_path / "checkpoints"
    return directory.exists() and any(
      "tmp" in p.name for p in directory.iterdir() if not p.name.startswith("3")
    )

  for moment in (reached, saving):
    child = subprocess.Popen(
      command(tmp_path, *STEPS), env=env, stdout=subprocess.DEVNULL
    )
    wait_for(moment, child)
    child.kill()
    child.wait()
  done = subprocess.run(
    command(tmp_path, *STEPS), env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "going on from step" in done.stdout, after
  step, state = final_state(tmp_path)
  expected_step, expected = final_state(uninterrupted)
  assert step == expected_step == 12
  for path, value in expected.items():
    np.testing.assert_array_equal(state[path], value, err_msg=str(path))
  lines = [
    [(m["step"], m.get("train/loss")) for m in log.read_metrics(d)]
    for d in (tmp_path, uninterrupted)
  ]
  assert lines[0] == lines[1], after
  again = subprocess.run(
    command(tmp_path, *STEPS), env=env, capture_output=True, text=True
  )
  assert again.returncode == 0 and "complete, all 12 steps" in again.stdout


def test_sigterm_saves_and_exits_75(uninterrupted, tmp_path, tmp_path_factory):
  env = environment(tmp_path_factory)
  child = subprocess.Popen(
    command(tmp_path, *STEPS), env=env, stdout=subprocess.PIPE, text=True
  )
  wait_for(lambda: len(log.read_metrics(tmp_path)) >= 4, child)
  child.send_signal(signal.SIGTERM)
  out, _ = child.communicate(timeout=60)
  assert child.returncode == 75
  step = checkpoint.Checkpoints(tmp_path).steps()[-1]
  assert f"saved at step {step}" in out and step >= 3


def count_compilations(function):
  compiled = []

  def listen(event, duration, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(kwargs.get("fun_name"))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    function()
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  return compiled


def test_step_compiles_once_over_evaluation_save_and_restore(tmp_path):
  evals = {"knn": {"k": 20, "temperature": 0.1}}
  config = smoke(total_steps=6, eval_every=2, evals=evals)
  first = count_compilations(lambda: train(tmp_path, **config))
  assert sum("train_step" in str(name) for name in first) == 1, first
  # From a checkpoint: the restored state is laid out as the initialised one was.
  shutil.rmtree(tmp_path / "checkpoints" / "6")
  again = count_compilations(lambda: train(tmp_path, **config))
  assert sum("train_step" in str(name) for name in again) <= 1


def test_non_finite_loss_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
  config = smoke(total_steps=40, checkpoint_every=1)
  config["optim"] |= {"learning_rate": 1e30, "warmup_steps": 0}
  with pytest.raises(FloatingPointError, match=r"not finite at step \d+"):
    train(tmp_path, **config)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  for step in checkpoints.steps():
    for leaf in jax.tree.leaves(checkpoints.restore_tree(step)):
      if leaf.dtype == np.float32:
        assert np.isfinite(np.asarray(leaf)).all()


def test_another_config_in_the_same_workdir_is_refused(tmp_path):
  config = smoke()
  assert train(tmp_path, **config) == 0
  changed = smoke(seed=5)
  changed["data"] = copy.deepcopy(changed["data"])
  changed["data"]["augment"]["image"]["size"] = 16
  with pytest.raises(ValueError) as error:
    train(tmp_path, **changed)
  message = str(error.value)
  assert "seed 0 -> 5" in message and "data.augment.image.size 32 -> 16" in message
  assert "init_from" in message and "\n" not in message
  # What does not change the result may change.
  free = smoke(
    log_every=2, eval_every=7, checkpoint_every=1, mesh={"data": 4, "fsdp": 2}
  )
  assert train(tmp_path, **free) == 0


def test_config_json_keeps_every_version(tmp_path):
  train(tmp_path, **smoke(total_steps=2))
  history = json.loads((tmp_path / "config.json").read_text())
  assert history[0]["step"] == 0 and "jax" in history[0]["versions"]
  assert workdir.read_config(tmp_path)["total_steps"] == 2


@pytest.mark.parametrize(
  "change, message",
  [
    ({"batch_size": 12}, "batch_size 12 does not divide over 8 devices; use 8 or 16"),
    ({"total_steps": 0}, "total_steps is 0"),
    ({"mesh": {"data": 3, "fsdp": 1}}, "data=3"),
    ({"profile": "5"}, "profile is '5'"),
    ({"evals": {"nearest": {}}}, "no evaluation 'nearest'"),
    (
      {"method": {"name": "simclear"}},
      "no method 'simclear'; there are: clip, clip_distill, simclr, slip",
    ),
  ],
)
def test_bad_values_are_one_line(tmp_path, change, message):
  with pytest.raises(ValueError) as error:
    train(tmp_path, **smoke(**change))
  assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config=configs/simclr.py:smok"], "no variant 'smok'; there are: demo"),
    (["--config=configs/simclr.py:smoke", "--config.batchsize=4"], "batch_size"),
    (["--config=configs/simclr.py:smoke", "--config.batch_size=x"], "batch_size"),
    (
      ["--config=configs/simclr.py:smoke", "--config.optim.learning_rte=1"],
      "has no option 'learning_rte'",
    ),
    (["--config=configs/simclr.py:smoke", "--config.optim.lr=1"], "no option 'lr'"),
    (
      ["--config=configs/simclr.py:smoke", "--config.data.augmnt.image.size=3"],
      "no key 'augmnt' in data; did you mean 'augment'?",
    ),
    (
      ["--config=configs/simclr.py:smoke", "--config.method.temprature=1"],
      "no key 'temprature' in method; did you mean 'temperature'?",
    ),
    (
      ["--config=configs/simclr.py:smoke", "--config.evals.knn.kk=1"],
      "no key 'kk' in evals.knn; did you mean 'k'?",
    ),
    ([], "--config"),
  ],
)
def test_command_line_errors_are_one_line(arguments, message):
  done = subprocess.run(
    [sys.executable, "-m", "clj.main", *arguments], capture_output=True, text=True
  )
  assert done.returncode == 1
  assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, (
    done.stderr
  )


def test_profile_writes_a_trace(tmp_path, tmp_path_factory):
  """In a process of its own: the profiler crashes beside the TPU's compiler."""
  done = subprocess.run(
    # The last step ends the trace at the latest.
    [*command(tmp_path, "--config.profile=1:100"), "--config.evals={}"],
    env=environment(tmp_path_factory),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
  (events,) = trace.parent.glob("*.trace.json.gz")
  with gzip.open(events) as file:
    names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
  assert any("train_step" in name for name in names)


@pytest.mark.slow
def test_losses_go_on_with_other_devices_and_shardings(tmp_path, tmp_path_factory):
  split = {"data": 2, "fsdp": 4, "rules": (("projector/dense1", ("fsdp",)),)}
  config = smoke(total_steps=6, checkpoint_every=3)
  lay = {"replicated": config, "split": config | {"mesh": split}}
  for name, changed in lay.items():
    assert train(tmp_path / name, **changed) == 0
  losses = lambda directory: {
    m["step"]: m["train/loss"] for m in log.read_metrics(directory)
  }
  expected = losses(tmp_path / "replicated")

  def go_on(source, name, run):
    directory = tmp_path / f"{source}-{name}"
    shutil.copytree(tmp_path / source, directory)
    shutil.rmtree(directory / "checkpoints" / "6")
    (directory / "hashes" / "6.0.json").unlink()
    run(directory)
    found = losses(directory)
    assert sorted(found) == list(range(1, 7))
    for step in (4, 5, 6):
      assert abs(found[step] - expected[step]) < 1e-5 * expected[step], (name, step)

  def on(devices):
    def run(directory):
      options = ("--config.total_steps=6", "--config.checkpoint_every=3")
      done = subprocess.run(
        command(directory, *options, "--config.evals={}"),
        env=environment(tmp_path_factory) | {"JAX_NUM_CPU_DEVICES": str(devices)},
        capture_output=True,
        text=True,
      )
      assert done.returncode == 0, done.stderr
      assert "going on from step 3" in done.stdout

    return run

  for source in lay:
    for devices in (4, 2, 1):
      go_on(source, str(devices), on(devices))
  for source, target in (("replicated", "split"), ("split", "replicated")):
    go_on(source, target, lambda path, to=target: train(path, **lay[to]))


def test_where_the_time_goes_adds_up(tmp_path):
  """Parts of what the metrics of a run say, against the clock beside it."""
  began = time.monotonic()
  evals = {"diagnostics": {}}
  config = smoke(total_steps=30, eval_every=10, checkpoint_every=10, evals=evals)
  assert train(tmp_path, **config) == 0
  wall = time.monotonic() - began
  lines = log.read_metrics(tmp_path)
  of = lambda key: [m[f"perf/{key}_seconds"] for m in lines if "train/loss" in m]
  # One step a line: what a step takes has host_wait and device in it.
  for whole, host_wait, device in zip(of("step"), of("host_wait"), of("device")):
    assert host_wait >= 0 and device >= 0 and host_wait + device < whole + 1e-3
  evaluations = [m for m in lines if "perf/evaluation_seconds" in m]
  assert [m["step"] for m in evaluations] == [0, 10, 20, 30]
  saves = {m["step"] for m in lines if m.get("perf/checkpoint_seconds", 0) > 0}
  assert saves == {11, 21}  # on the next line; that of the end is on none
  np.testing.assert_allclose(
    sum(of("step")), lines[-2]["perf/train_seconds"], rtol=1e-6
  )
  told = sum(of("step")) + sum(of("checkpoint"))
  told += sum(m["perf/evaluation_seconds"] for m in evaluations)
  assert 0.2 * wall < told < wall  # the rest: data, the first state, the last save


def test_init_from_a_workdir(tmp_path, capsys):
  train(tmp_path / "first", **smoke())
  started = smoke(init_from=str(tmp_path / "first"), total_steps=1, seed=3)
  started["optim"] |= {"learning_rate": 0.0}
  train(tmp_path / "second", **started)
  assert "arrays taken" in capsys.readouterr().out
  _, first = final_state(tmp_path / "first")
  _, second = final_state(tmp_path / "second")
  for path, value in first.items():
    if "params" in str(path[0]):
      np.testing.assert_array_equal(second[path], value)


def test_a_flat_folder_without_labels_runs(tmp_path):
  rng = np.random.default_rng(0)
  (tmp_path / "in").mkdir()
  for i in range(40):
    picture = Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8))
    picture.save(tmp_path / "in" / f"{i}.png")
  (tmp_path / "in" / "notes.txt").write_text("not a picture")
  (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8 not a picture either")
  config = smoke(evals={"diagnostics": {}}, total_steps=4, eval_every=2)
  config["data"] = config["data"] | {
    "source": f"folder:{tmp_path / 'in'}",
    "train_split": "train[:80%]",
    "test_split": "train[80%:]",
  }
  assert train(tmp_path / "out", **config) == 0
  values = log.last_values(tmp_path / "out", "eval/")
  assert 0 <= values["eval/diagnostics/alignment"] <= 4
  # What needs classes is refused before a step, not left out without a word.
  with pytest.raises(UserError, match="'knn' needs 'label'"):
    train(tmp_path / "labels", **config | {"evals": {"knn": {"k": 5}}})


def test_a_save_that_fails_ends_the_run(tmp_path, monkeypatch):
  state = {"w": jax.numpy.ones(4)}
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, state, {}, {})
  checkpoints.wait()

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoint, "_committed", lambda path: False)
  checkpoints.save(2, state, {}, {})
  monkeypatch.setattr(checkpoints._saver, "wait_until_finished", full)
  with pytest.raises(checkpoint.CheckpointError, match="saving step 2 .*No space left"):
    checkpoints.wait()


def test_too_few_probe_classes_is_one_line(tmp_path):
  config = smoke()
  config["method"] = config["method"] | {"probe_classes": 5}
  with pytest.raises(UserError, match="9 different values of 'label'.* takes 5"):
    train(tmp_path, **config)


def test_the_tokenizer_travels_with_the_run(tmp_path, capsys):
  data = smoke()["data"] | {
    "source": "shapes/compositions",
    "train_split": "train[:64]",
    "columns": {
      "image": {},
      "text": {"field": "caption", "tokenizer": "words", "length": 8},
    },
  }
  config = smoke(data=data, checkpoint_every=1)
  assert train(tmp_path, **config) == 0
  saved = text.load(tmp_path / "tokenizer")
  share = log.last_values(tmp_path)["data/truncated_captions"]
  assert 0 < share < 1
  assert f"8 a caption, {share:.1%} of the captions are cut" in capsys.readouterr().out
  # The run goes on with the vocabulary that it has, or not at all.
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  (tmp_path / "hashes" / "2.0.json").unlink()
  settings = (tmp_path / "tokenizer" / "settings.json").read_text()
  (tmp_path / "tokenizer" / "settings.json").unlink()
  with pytest.raises(ValueError, match="there is no tokenizer in"):
    train(tmp_path, **config)
  (tmp_path / "tokenizer" / "settings.json").write_text(settings)
  bpe = copy.deepcopy(data)
  bpe["columns"]["text"]["tokenizer"] = "bpe"
  with pytest.raises(ValueError, match="another kind of vocabulary, 'words'"):
    train(tmp_path, **config | {"data": bpe})
  assert train(tmp_path, **config) == 0
  assert "going on from step 1" in capsys.readouterr().out
  assert text.load(tmp_path / "tokenizer").settings == saved.settings
  # Another vocabulary of the same kind and length, put in its place.
  other = text.open_tokenizer("words", length=8, captions=lambda: ["not the same"])
  other.save(tmp_path / "tokenizer")
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  (tmp_path / "hashes" / "2.0.json").unlink()
  with pytest.raises(ValueError, match="'text' is not what the checkpoint was trained"):
    train(tmp_path, **config)


def test_a_text_tower_with_other_ids_is_not_taken(tmp_path):
  learn = lambda *captions: text.open_tokenizer(
    "words", length=8, captions=lambda: captions
  )
  made, other = learn("a red star"), learn("a blue ring")
  made.save(tmp_path / "tokenizer")
  (tmp_path / "config.json").write_text("[]")
  longer = text.open_tokenizer(str(tmp_path / "tokenizer"), length=20)
  taken = {"params/text/token": np.ones(3)}
  for path in (tmp_path, tmp_path / "checkpoints" / "4"):
    check = lambda tokenizer, taken, path=path: init_from._check_columns(
      path, {"text": tokenizer.settings}, taken
    )
    check(made, taken)
    check(longer, taken)
    check(other, {"params/image/kernel": np.ones(3)})  # its text tower was not taken
    with pytest.raises(UserError, match="vocabulary; set data.columns.text.tokenizer"):
      check(other, taken)
