"""Embeds a collection with a trained model; `clj.search` then finds in it.

    python -m clj.embed --workdir=runs/clip-demo --source=folder:/photos --out=index

What comes out is described in `clj.index.store`. Records are read as a stream and
decoded as they come, batches are split over the devices of a process, and every `rows_per_shard`
records become a part of the index, renamed to its name when it is whole. So the same
command goes on after any kill, with the parts that are missing, and since no batch
spans two parts the result is the same bit for bit. A corrupt record is left out and
counted; what stays has its own ids. Of several processes each writes every n-th part.
"""

import dataclasses
import fcntl
import functools
import glob
import hashlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from clj import augment, cli, evaluate, sharding
from clj.cli import UserError
from clj.data import pipeline, sources
from clj.data.source import DataError, first_line
from clj.index import store as index
from clj.losses import l2_normalize
from clj.runs import processes
from clj.runs.workdir import is_remote

WHAT = {"image": ("image",), "text": ("text",), "both": ("image", "text")}
_REASONS = 10  # that are kept of a part


def embed(
  workdir,
  out: str,
  *,
  source: str | None = None,
  split: str | None = None,
  data_dir: str | None = None,
  fields: dict[str, str] | None = None,
  caption: str | None = None,
  what: str = "image",
  format: str = "parquet",
  batch_size: int = 256,
  rows_per_shard: int = 16384,
  step: int | None = None,
  threads: int | None = None,
) -> dict:
  """Writes an index; goes on where an earlier run was killed.

  Args:
    workdir, step: of the model, as for `clj.load`.
    out: directory of the index, which all processes see.
    source: what `open_source` takes; None: the data of the run.
    split: None: the test split of the run's own data, "train" of others (a folder
      without splits is all "train").
    data_dir: of TFDS data.
    fields, caption: as for `open_source`. caption None: that of the run, or "caption"
      where there is one; "": without.
    what: "image", "text" (every caption a row) or "both".
    format: "parquet" or "npy".
    batch_size: of all devices of a process together.
    rows_per_shard: records of a part.
    threads: that decode; None: one a processor.

  Returns what index.json has.

  Raises:
    ValueError, DataError, CheckpointError: one line; no such run, data that cannot be
      read, or `out` holds something else.
  """
  for name, value in (("batch_size", batch_size), ("rows_per_shard", rows_per_shard)):
    if value < 1:
      raise UserError(f"--{name}={value}: it is 1 or more")
  if format not in index.FORMATS:
    raise UserError(f"no format {format!r}; there are: {', '.join(index.FORMATS)}")
  if what not in WHAT:
    raise UserError(f"--what={what}: there are {', '.join(WHAT)}")
  if is_remote(out):
    raise UserError(f"{out} is no local directory: write one, and copy it there")
  model = evaluate.load(workdir, step)
  if "text" in WHAT[what] and model.tokenize is None:
    raise UserError(f"{workdir} has no text tower: use --what=image")
  data = model.config["data"]
  opened, described = _open(data, source, split, data_dir, fields, caption)
  if "text" in WHAT[what] and not opened.captioned:
    raise DataError(
      f"{opened.name} has no captions: use --what=image, or name --caption"
    )
  parts = -(-len(opened) // rows_per_shard)
  settings = {
    "format": format,
    "what": what,
    **_outputs(model, what),
    "dtype": "float32",
    "normalised": True,
    **described,
    "records": len(opened),
    "files": opened.files and _digest("\n".join(opened.files).encode()),
    "rows_per_shard": rows_per_shard,
    "parts": parts,
    "size": data["size"],
    "crop": data.get("eval_crop", 0.875),
    "method": model.config["method"]["name"],
    "workdir": str(workdir) if is_remote(workdir) else os.path.abspath(workdir),
    "step": model.step,
    "weights": fingerprint(model),
    "tokenizer": model.tokenizer and model.tokenizer.fingerprint,
  }
  made = _claim(out, settings)
  with open(os.path.join(out, f".lock-{jax.process_index()}"), "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise DataError(f"another clj.embed is at work in {out}") from None
    mine = range(jax.process_index(), parts, jax.process_count())
    todo = sorted(set(mine) - set(made.there()))
    if todo:
      _write_parts(made, todo, model, opened, batch_size, threads)
    while len(made.there()) < parts:  # other processes are at work
      processes.tell("busy")
      time.sleep(1)
    made = _finish(made, opened.name)
    os.remove(lock.name)
    return made.info


def fingerprint(model: evaluate.Loaded) -> str:
  """Of the weights, whatever directory they lie in; 16 hexadecimal digits."""
  digest = hashlib.sha256()
  leaves, _ = jax.tree_util.tree_flatten_with_path((model.params, model.extra))
  for path, leaf in leaves:
    array = np.asarray(leaf)
    digest.update(f"{sharding.name(path)} {array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).data)
  return digest.hexdigest()[:16]


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]


def _open(data, source, split, data_dir, fields, caption):
  """The source, and how it is opened again: arguments of `reopen`."""
  own = source in (None, data["source"])
  source = source or data["source"]
  if not source:
    raise DataError(
      "the run has no data of its own: name --source, such as folder:/path"
    )
  kind, _, path = source.partition(":")
  if kind in ("folder", "csv", "parquet", "webdataset") and "://" not in path:
    source = f"{kind}:{os.path.abspath(os.path.expanduser(path))}"
  fields = {k: v for k, v in (fields or {}).items() if v}
  described = {
    "source": source,
    "split": split or (data["test_split"] if own else "train"),
    "data_dir": data_dir or (own and data.get("data_dir")) or None,
    "fields": (own and data.get("fields") or {}) | fields,
  }
  guess = caption is None
  if guess and own and data.get("text"):
    caption = data["text"].get("field", "caption")
  try:
    wanted = "caption" if caption is None else caption
    described["caption"] = wanted or None
    return reopen(described), described
  except DataError:
    if not guess:
      raise
  described["caption"] = None  # or the error is another one, and comes again
  return reopen(described), described


def reopen(info: dict):
  """The data set that an index was made of, nothing of it held in memory but tables."""
  return sources.open_source(
    info["source"],
    info["split"],
    info["data_dir"],
    memory_limit=0,
    caption=info["caption"],
    fields=info["fields"],
  )


def _outputs(model, what) -> dict:
  """Names of the model's outputs that are embeddings, and their width."""
  data, batch, names = model.config["data"], {}, {}
  if "image" in WHAT[what]:
    shape = (1, 1, data["size"], data["size"], 3)
    batch["image"] = jax.ShapeDtypeStruct(shape, np.float32)
  if "text" in WHAT[what]:
    shape = (1, model.tokenizer.length)
    batch["text"] = jax.ShapeDtypeStruct(shape, np.int32)
    batch["text_mask"] = jax.ShapeDtypeStruct(shape, bool)
  found = jax.eval_shape(model.embed, model.params, model.extra, batch)
  if "image" in batch:
    names["image"] = "image" if "image" in found else "features"
  if "text" in batch:
    names["text"] = "text"
  (dim,) = {found[name].shape[-1] for name in names.values()}
  return {"outputs": names, "dim": dim}


def _claim(out: str, settings: dict) -> index.Index:
  """The index in `out`, new or begun; refuses what has other settings."""
  free = ("workdir", "data_dir")  # they may have moved, or differ between hosts
  os.makedirs(out, exist_ok=True)
  there = [name for name in os.listdir(out) if not name.startswith(".")]
  if not there:
    return index.Index(out, settings | {"complete": False}).write_info()
  if "index.json" not in there:
    raise UserError(
      f"{out} is no index, and has other files in it ({there[0]}): take another --out"
    )
  made = index.open_index(out)
  old = {key: made.info.get(key) for key in settings}
  changed = [k for k in settings if old[k] != settings[k] and k not in free]
  if changed:
    listed = ", ".join(f"{k} {old[k]!r} -> {settings[k]!r}" for k in changed)
    raise UserError(
      f"{out} holds an index with other settings ({listed}); take another --out, or "
      "remove it"
    )
  return made


def _write_parts(made, todo, model, source, batch_size, threads):
  """Embeds the records of the parts `todo` and writes those, one after the other."""
  info = made.info
  mesh = sharding.make_mesh(devices=jax.local_devices())
  batch_size = -(-batch_size // mesh.size) * mesh.size
  params, extra = jax.device_put((model.params, model.extra), sharding.replicated(mesh))

  @jax.jit
  def of_pictures(params, extra, picture):
    found = model.embed(params, extra, augment.to_float({"image": picture}))
    return l2_normalize(found[info["outputs"]["image"]].astype(np.float32))

  @jax.jit
  def of_texts(params, extra, batch):
    found = model.embed(params, extra, batch)
    return {"text": l2_normalize(found["text"].astype(np.float32))}

  batches = []  # (part, records)
  for part in todo:
    start = part * info["rows_per_shard"]
    stop = min(start + info["rows_per_shard"], len(source))
    for first in range(start, stop, batch_size):
      batches.append((part, range(first, min(first + batch_size, stop))))
  with_pictures = "image" in info["outputs"]
  stream = pipeline.record_batches(
    source,
    [records for _, records in batches],
    batch_size=batch_size,
    size=info["size"] if with_pictures else None,
    crop=info["crop"],
    threads=threads,
  )

  def embedded():
    """A batch behind what the devices are at."""
    waiting = None
    for (part, numbers), (pictures, records) in zip(batches, stream):
      z = None
      if with_pictures:
        pictures = sharding.to_global({"picture": pictures}, mesh)["picture"]
        z = of_pictures(params, extra, pictures)
      if waiting:
        yield waiting
      waiting = part, numbers, records, z
    yield waiting

  bar = tqdm(
    total=sum(len(records) for _, records in batches),
    unit="record",
    disable=not sys.stderr.isatty() or jax.process_index() != 0,
    dynamic_ncols=True,
  )
  with jax.set_mesh(mesh), bar:
    for part, group in itertools.groupby(embedded(), key=lambda x: x[0]):
      began, pieces, rows, captions = time.monotonic(), [], [], []
      notes = {"images": 0, "texts": 0, "skipped": 0, "reasons": []}
      for _, numbers, records, z in group:
        processes.tell("busy")
        good = [i for i, r in enumerate(records) if not isinstance(r, Exception)]
        if z is not None:
          pieces.append(np.asarray(z)[good])
        for number, record in zip(numbers, records):
          if isinstance(record, Exception):
            notes["skipped"] += 1
            reason = f"{_name(source, number)}: {first_line(record)[:200]}"
            notes["reasons"] = [*notes["reasons"], reason][:_REASONS]
            continue
          row = _row(source, number, record)
          if z is not None:
            rows.append(row | {"modality": "image"})
          if "text" in info["outputs"]:
            captions += [
              row | {"modality": "text", "captions": [c]} for c in row["captions"]
            ]
        bar.update(len(numbers))
      notes |= {"images": len(rows), "texts": len(captions)}
      if captions:
        said = [row["captions"][0] for row in captions]
        z = evaluate.embed_texts(
          functools.partial(of_texts, params, extra),
          model.tokenizer,
          said,
          batch_size=batch_size,
        )
        pieces.append(z["text"])
      rows += captions
      columns = {name: [row[name] for row in rows] for name in index.COLUMNS}
      pieces = pieces or [np.zeros((0, info["dim"]), np.float32)]
      made.write(part, np.concatenate(pieces), columns, notes)
      if bar.disable:
        there = len(made.there())
        print(
          f"{made.file(part)}: {len(rows)} rows, {notes['skipped']} records skipped, "
          f"{time.monotonic() - began:.1f} s; {there} of {info['parts']} files",
          flush=True,
        )


def _name(source, number):
  return source.files[number] if source.files else f"record {number}"


def _row(source, number, record):
  label, names = record["label"], source.class_names
  return {
    "id": record["id"],
    "path": record.get("path"),
    "record": number,
    "captions": list(record.get("caption", [])),
    "label": names[label] if names and label >= 0 else None,
  }


def _finish(made, name) -> index.Index:
  """Writes what all parts have together."""
  if made.info["complete"]:
    return made
  notes = [made.notes(part) for part in range(made.info["parts"])]
  total = {k: sum(n[k] for n in notes) for k in ("images", "texts", "skipped")}
  rows = total["images"] + total["texts"]
  reasons = [reason for n in notes for reason in n["reasons"]][:_REASONS]
  if not rows:
    why = reasons[0] if reasons else "no record has a caption"
    raise DataError(f"nothing of {name} could be embedded: {why}")
  sizes = {key: [n[key] for n in notes] for key in ("images", "texts")}
  more = {"rows": rows, **total, "reasons": reasons, "rows_of_parts": sizes}
  if jax.process_index() != 0:
    return dataclasses.replace(made, info=made.info | more)
  for partial in glob.glob(os.path.join(glob.escape(made.directory), ".*.partial")):
    os.remove(partial)  # of processes that were killed
  return made.write_info(complete=True, **more)


def main(argv: Sequence[str] | None = None) -> int:
  argv = sys.argv[1:] if argv is None else list(argv)
  try:
    arguments = _parse(argv)
    run = processes.find(
      arguments.coordinator, arguments.num_processes, arguments.process_id
    )
  except UserError as error:
    return cli.complain(error)
  cli.quiet_libraries()
  if run.count > 1 and not processes.is_child():
    command = [sys.executable, "-m", "clj.embed", *argv]
    return processes.supervise(command, arguments.heartbeat)
  try:
    cli.split_cpu(arguments.batch_size)
    if run.count > 1:
      processes.connect(run, arguments.heartbeat)
      signal.signal(signal.SIGTERM, _stop)  # each by itself: nothing has to be agreed
    code = _run(arguments)
  except Exception as error:
    if run.count > 1 and processes.is_loss(error):
      processes.leave_lost()
    code = cli.failed(error)
  return code if run.count == 1 else processes.leave(code)


def _parse(argv):
  parser = cli.parser(
    "clj.embed", "Embeds a collection with a trained model, for clj.search."
  )
  parser.add_argument(
    "--workdir", required=True, help="of the run, or imported weights"
  )
  parser.add_argument("--out", required=True, help="directory of the index")
  parser.add_argument(
    "--source",
    help="shapes, a TFDS name, folder:PATH, csv:PATH, parquet:PATH or webdataset:PATH;"
    " default: the data of the run",
  )
  parser.add_argument(
    "--split", help="default: train, or the test split of the run's own data"
  )
  parser.add_argument("--data_dir", help="of TFDS; default: TFDS_DATA_DIR")
  parser.add_argument("--image", help="column of the picture")
  parser.add_argument("--label", help="column of the class")
  parser.add_argument("--caption", help='column of the captions; "": none')
  parser.add_argument("--what", default="image", help="image, text or both")
  parser.add_argument("--format", default="parquet", help="parquet or npy")
  parser.add_argument("--batch_size", type=int, default=256)
  parser.add_argument(
    "--rows_per_shard", type=int, default=16384, help="records of a file"
  )
  parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  parser.add_argument("--threads", type=int, help="that decode; default: one a core")
  cli.add_process_flags(parser)
  return parser.parse_args(argv)


def _stop(*_):
  """Ends this process at once: files are whole or not there."""
  processes.tell(f"exit {processes.AGAIN}")
  os._exit(processes.AGAIN)


def _run(arguments) -> int:
  out = os.fspath(epath.Path(arguments.out).expanduser())
  info = embed(
    arguments.workdir,
    out,
    source=arguments.source,
    split=arguments.split,
    data_dir=arguments.data_dir,
    fields={"image": arguments.image, "label": arguments.label},
    caption=arguments.caption,
    what=arguments.what,
    format=arguments.format,
    batch_size=arguments.batch_size,
    rows_per_shard=arguments.rows_per_shard,
    step=arguments.step,
    threads=arguments.threads,
  )
  print(
    f"{out} is complete: {info['rows']} embeddings of width {info['dim']} in "
    f"{info['parts']} files, of {info['source']} {info['split']}; "
    f"{info['skipped']} corrupt records skipped"
  )
  for reason in info["reasons"]:
    print(f"  {reason}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
