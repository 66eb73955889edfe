"""Embeds a collection into an index, and goes on after any kill.

Records are read as a stream and decoded as they come, batches are split over the
devices of a process, and every `rows_per_shard` records become a part of the index,
renamed to its name when it is whole. So the same call goes on with the parts that are
missing, and since no batch spans two parts the result is the same bit for bit. A
corrupt record is left out and counted; what stays has its own ids. Of several processes
each writes every n-th part.
"""

import dataclasses
import fcntl
import functools
import glob
import hashlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from clj import sharding
from clj.cli import UserError
from clj.data import DataError, Split
from clj.data.dataset import data_of_run
from clj.data.source import first_line
from clj.evals.embedder import is_lack, programs
from clj.evals.load import Loaded, load
from clj.evals.rows import is_picture
from clj.index import store
from clj.losses import l2_normalize
from clj.runs import processes
from clj.runs.workdir import is_remote, read_config

LOCAL = ("folder", "csv", "parquet", "webdataset")  # sources that are named by a path
_REASONS = 10  # that are kept of a part


def build(
  workdir,
  out: str,
  *,
  source: str | None = None,
  split: str | None = None,
  data_dir: str | None = None,
  fields: dict[str, str] | None = None,
  caption: str | None = None,
  what: str | None = None,
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
    source: as data.source of a config; None: the data of the run.
    split: None: the test split of the run's own data, "train" of others (a folder
      without splits is all "train").
    data_dir: of TFDS data.
    fields: of columns other than texts, where they are called otherwise than these.
    caption: field of the texts. None: that of the run, or "caption" where there is one;
      "": without.
    what: the column that is embedded: "image", or of a method for other data another;
      "text" (every caption a row); or "both". None: what the method is for.
    format: "parquet" or "npy".
    batch_size: of all devices of a process together.
    rows_per_shard: records of a part.
    threads: that decode; None: one a processor.

  Returns what index.json has.

  Raises:
    UserError, DataError, CheckpointError: one line; no such run, data that cannot be
      read, or `out` holds something else.
  """
  _check(out, what, format, batch_size=batch_size, rows_per_shard=rows_per_shard)
  mesh = _mesh(workdir)
  with jax.set_mesh(mesh):
    model = load(workdir, step, mesh)
    outputs, dim = _outputs(model, workdir, what)
    texts = _texts(model.columns)
    text = next((n for n in outputs if n in texts), next(iter(texts), None))
    wanted = [name for name in outputs if name not in texts]
    opened, described = _open(
      model, workdir, text, wanted, source, split, data_dir, fields, caption, threads
    )
    if not described["caption"]:
      text = None
    if text is None and set(outputs) & set(texts):
      raise DataError(
        f"{opened.name} has no captions: use --what=image, or name --caption"
      )
    settings = {
      "format": format,
      "what": what or next(iter(outputs)),
      "outputs": outputs,
      "dim": dim,
      "dtype": "float32",
      "normalised": True,
      **described,
      "records": len(opened),
      "files": opened.source.files and _digest("\n".join(opened.source.files).encode()),
      "rows_per_shard": rows_per_shard,
      "parts": -(-len(opened) // rows_per_shard),
      **_cut(model, outputs),
      "method": model.config["method"]["name"],
      "workdir": str(workdir) if is_remote(workdir) else os.path.abspath(workdir),
      "step": model.step,
      "weights": fingerprint(model),
      "tokenizer": model.tokenizer and model.tokenizer.fingerprint,
    }
    made = _claim(out, settings)
    return _fill(Work(made, model, opened, mesh, batch_size, text)).info


class Work(NamedTuple):
  """What is put into an index, and by whom. text: the column of captions, or None."""

  index: store.Index
  model: Loaded
  split: Split
  mesh: Mesh
  batch_size: int
  text: str | None


def _check(out, what, format, **positive):
  for name, value in positive.items():
    if value < 1:
      raise UserError(f"--{name}={value}: it is 1 or more")
  if format not in store.FORMATS:
    raise UserError(f"no format {format!r}; there are: {', '.join(store.FORMATS)}")
  if is_remote(out):
    raise UserError(f"{out} is no local directory: write one, and copy it there")


def _mesh(workdir) -> Mesh:
  """Of this process's devices; parameters split as in the run, as far as they allow."""
  devices = jax.local_devices()
  fsdp = read_config(workdir)["mesh"]["fsdp"]
  fsdp = len(devices) if fsdp == -1 else math.gcd(fsdp, len(devices))
  return sharding.make_mesh(-1, fsdp, devices)


def _fill(work: Work) -> store.Index:
  """Writes what is missing, alone in the directory."""
  made, parts = work.index, work.index.info["parts"]
  path = os.path.join(made.directory, f".lock-{jax.process_index()}")
  with open(path, "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise DataError(f"another clj.embed is at work in {made.directory}") from None
    mine = range(jax.process_index(), parts, jax.process_count())
    if todo := sorted(set(mine) - set(made.there())):
      _write_parts(work, todo)
    while len(made.there()) < parts:  # other processes are at work
      processes.tell("busy")
      time.sleep(1)
    made = _finish(made, work.split.name)
    os.remove(path)
    return made


def fingerprint(model: Loaded) -> str:
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


def _texts(columns) -> list[str]:
  return [name for name, column in columns.items() if column.tokenizer is not None]


def _open(
  model, workdir, text, wanted, source, split, data_dir, fields, caption, threads
):
  """The split to embed, and how it is opened again: a part of index.json."""
  section = model.config["data"]
  own = source in (None, section["source"])
  source = source or section["source"]
  if not source:
    raise DataError(
      "the run has no data of its own: name --source, such as folder:/path"
    )
  kind, _, path = source.partition(":")
  if kind in LOCAL and "://" not in path:
    source = f"{kind}:{os.path.abspath(os.path.expanduser(path))}"
  of_run = {
    name: options["field"]
    for name, options in section["columns"].items()
    if own and options.get("field")
  }
  of_text = of_run.pop(text, text if own else "caption")
  described = {
    "source": source,
    "split": split or (section["test_split"] if own else "train"),
    "data_dir": data_dir or (own and section.get("data_dir")) or None,
    "fields": of_run | {k: v for k, v in (fields or {}).items() if v},
  }
  run = data_of_run(section, workdir, memory_limit=0)

  def opened(caption):
    named = {name: name for name in wanted} | described["fields"]  # must be there
    columns = {name: {"field": field} for name, field in named.items()}
    if "label" not in section["columns"]:
      columns.setdefault("label", {"kind": "label"})
    if text and caption:
      columns[text] = {"field": caption}
    asked = {key: described[key] for key in ("source", "data_dir") if described[key]}
    splits = dict.fromkeys(("train_split", "test_split"), described["split"])
    asked |= splits | {"columns": columns, "threads": threads or 0}
    found = run.other(asked).train
    return found, described | {"caption": (text and caption) or None}

  if caption is not None:
    return opened(caption)
  try:
    return opened(of_text)
  except DataError:
    return opened("")  # or the error is another one, and comes again


def _outputs(model: Loaded, workdir, what) -> tuple[dict[str, str], int]:
  """{column: the output that is its embedding}, and the width of all."""
  columns, texts = model.columns, _texts(model.columns)
  pictures = [name for name, column in columns.items() if is_picture(column)]
  made = {name: found for name in columns if (found := _found(model, name))}
  if what in ("text", "both") and not texts:
    raise UserError(f"{workdir} has no text tower: use --what=image")
  names = {
    None: (pictures or list(made))[:1],
    "both": pictures[:1] + texts[:1],
  }.get(what, [what])
  outputs, widths = {}, set()
  for name in names:
    if name not in made:
      raise UserError(f"--what={what}: there are {', '.join(made)}")
    outputs[name] = next((o for o in (name, "features") if o in made[name]), None)
    if outputs[name] is None:
      raise UserError(
        f"--what={what}: of {name!r} the method makes {', '.join(made[name])}, and "
        f"neither {name!r} nor 'features'"
      )
    widths.add(made[name][outputs[name]].shape[-1])
  if len(widths) != 1:
    raise UserError(f"--what={what}: {outputs} have the widths {sorted(widths)}")
  return outputs, widths.pop()


def _found(model: Loaded, name: str) -> dict:
  """Shapes of what the method makes of one column."""
  rows = jax.sharding.get_mesh().size
  batch = {
    key: jax.ShapeDtypeStruct((rows, *row.shape), row.dtype)
    for key, row in model.columns[name].test_spec.items()
  }
  try:
    return programs(model.embed).shapes(model.params, model.extra, batch)
  except KeyError as error:
    if not is_lack(error, model.columns, model.config["data"].get("augment", {})):
      raise
    return {}


def _cut(model: Loaded, outputs) -> dict:
  """How pictures are cut, None where there are none."""
  name = next((n for n in outputs if is_picture(model.columns[n])), None)
  if name is None:
    return {"size": None, "crop": None}
  (spec,) = model.columns[name].test_spec.values()
  options = model.config["data"]["columns"][name]
  return {"size": spec.shape[1], "crop": options.get("eval_crop", 0.875)}


def _claim(out: str, settings: dict) -> store.Index:
  """The index in `out`, new or begun; refuses what has other settings."""
  free = ("workdir", "data_dir")  # they may have moved, or differ between hosts
  os.makedirs(out, exist_ok=True)
  there = [name for name in os.listdir(out) if not name.startswith(".")]
  if not there:
    return store.Index(out, settings | {"complete": False}).write_info()
  if "index.json" not in there:
    raise UserError(
      f"{out} is no index, and has other files in it ({there[0]}): take another --out"
    )
  made = store.open_index(out)
  old = {key: made.info.get(key) for key in settings}
  changed = [k for k in settings if old[k] != settings[k] and k not in free]
  if changed:
    listed = ", ".join(f"{k} {old[k]!r} -> {settings[k]!r}" for k in changed)
    raise UserError(
      f"{out} holds an index with other settings ({listed}); take another --out, or "
      "remove it"
    )
  return made


class Batch(NamedTuple):
  """Records of a part, and what the devices make of them."""

  part: int
  numbers: range
  records: list
  z: Any  # [batch_size, dim], or None


def _write_parts(work: Work, todo: list[int]):
  """Embeds the records of the parts `todo` and writes those, one after the other."""
  made, info = work.index, work.index.info
  embed = _unit(work)
  batches = _numbers(work, todo)
  bar = tqdm(
    total=sum(len(numbers) for _, numbers in batches),
    unit="record",
    disable=not sys.stderr.isatty() or jax.process_index() != 0,
    dynamic_ncols=True,
  )
  with bar:
    stream = _stream(work, batches, embed)
    for part, group in itertools.groupby(stream, key=lambda batch: batch.part):
      began = time.monotonic()
      pieces, rows, notes = _part(work, group, bar)
      pieces += _of_texts(work, rows, embed)
      columns = {name: [row[name] for row in rows] for name in store.COLUMNS}
      pieces = pieces or [np.zeros((0, info["dim"]), np.float32)]
      made.write(part, np.concatenate(pieces), columns, notes)
      if bar.disable:
        there = len(made.there())
        print(
          f"{made.file(part)}: {len(rows)} rows, {notes['skipped']} records skipped, "
          f"{time.monotonic() - began:.1f} s; {there} of {info['parts']} files",
          flush=True,
        )


def _rows_at_a_time(work: Work) -> int:
  return -(-work.batch_size // work.mesh.size) * work.mesh.size


def _numbers(work: Work, todo) -> list[tuple[int, range]]:
  """(part, numbers of its records) of each batch."""
  info, size, batches = work.index.info, _rows_at_a_time(work), []
  for part in todo:
    start = part * info["rows_per_shard"]
    stop = min(start + info["rows_per_shard"], len(work.split))
    for first in range(start, stop, size):
      batches.append((part, range(first, min(first + size, stop))))
  return batches


def _unit(work: Work) -> Callable:
  """`(batch, output) -> embeddings` of length 1, float32."""
  compiled = programs(work.model.embed)

  @functools.partial(jax.jit, static_argnums=3)
  def run(params, extra, batch, output):
    found = compiled.embed(params, extra, batch, (output,))[output]
    return l2_normalize(found.astype(np.float32))

  def embed(batch, output):
    batch = sharding.to_global(batch, work.mesh)
    return run(work.model.params, work.model.extra, batch, output)

  return embed


def _of_records(work: Work) -> tuple[str, str] | None:
  """The column of which each record is a row, and its output."""
  outputs, texts = work.index.info["outputs"], _texts(work.model.columns)
  return next(((n, o) for n, o in outputs.items() if n not in texts), None)


def _stream(work: Work, batches, embed) -> Iterator[Batch]:
  """The batches in their order, each one behind what the devices are at."""
  wanted = _of_records(work)
  columns = [work.split.columns[wanted[0]]] if wanted else []
  keys = [key for column in columns for key in column.test_spec]
  stream = work.split.record_batches(
    [numbers for _, numbers in batches], batch_size=_rows_at_a_time(work), keys=keys
  )
  waiting = None
  for (part, numbers), (batch, records) in zip(batches, stream):
    z = embed({key: batch[key] for key in keys}, wanted[1]) if wanted else None
    if waiting:
      yield waiting
    waiting = Batch(part, numbers, records, z)
  yield waiting


def _part(work: Work, group, bar):
  """Embeddings of a part's records, its rows of these and of their texts; notes."""
  wanted = _of_records(work)
  with_texts = work.text in work.index.info["outputs"]
  pieces, rows, captions = [], [], []
  notes = {"images": 0, "texts": 0, "skipped": 0, "reasons": []}
  for _, numbers, records, z in group:
    processes.tell("busy")
    good = [i for i, r in enumerate(records) if not isinstance(r, Exception)]
    if z is not None:
      pieces.append(np.asarray(z)[good])
    for number, record in zip(numbers, records):
      if isinstance(record, Exception):
        notes["skipped"] += 1
        reason = f"{_name(work.split, number)}: {first_line(record)[:200]}"
        notes["reasons"] = [*notes["reasons"], reason][:_REASONS]
        continue
      row = _row(work, number, record)
      if wanted:
        rows.append(row | {"modality": wanted[0]})
      if with_texts:
        own = {"modality": work.text}
        captions += [row | own | {"captions": [c]} for c in row["captions"]]
    bar.update(len(numbers))
  notes |= {"images": len(rows), "texts": len(captions)}
  return pieces, rows + captions, notes


def _of_texts(work: Work, rows, embed) -> list[np.ndarray]:
  """Embeddings of the rows that are texts; the last one fills up the last batch."""
  said = [row["captions"][0] for row in rows if row["modality"] == work.text]
  if not said:
    return []
  column, size = work.split.columns[work.text], _rows_at_a_time(work)
  made = column.rows([column.test(text) for text in said])
  output, pieces = work.index.info["outputs"][work.text], []
  for start in range(0, len(said), size):
    mine = np.minimum(np.arange(start, start + size), len(said) - 1)
    pieces.append(np.asarray(embed({k: x[mine] for k, x in made.items()}, output)))
  return [np.concatenate(pieces)[: len(said)]]


def _name(split: Split, number):
  files = split.source.files
  return files[number] if files else f"record {number}"


def _row(work: Work, number, record):
  label, names = record.get("label", -1), work.split.classes.get("label")
  return {
    "id": record["id"],
    "path": record.get("path"),
    "record": number,
    "captions": list(record.get(work.text) or []),
    "label": names[label] if names and label >= 0 else None,
  }


def _finish(made: store.Index, name: str) -> store.Index:
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
