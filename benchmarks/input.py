"""How fast batches come: `python -m benchmarks.input [--data_dir=DIR]`.

Prints one JSON line a measurement and a table. Alternatives take turns, and a figure is
the median over the turns, so that what else the machine does hits all alike.

  memory   batches of 512 CIFAR-10 pictures (else `shapes`) beside a bare `np.take`
  stream   photographs decoded and cropped twice to 224 pixels, beside decoding alone by
           as many threads, Grain's worker processes around the same work, and tf.data
           where TensorFlow is installed
  crops    2 x 224 and 2 x 224 + 6 x 96 pixels by `images.crops` in threads, beside
           decoding alone and tf.data; of the same photographs in memory, as they are
           and at 500 x 375 pixels
  start    opening the data set that is held in memory
"""

import argparse
import functools
import importlib.util
import io
import itertools
import json
import os
import statistics
import time
from concurrent import futures

import absl.flags
import grain
import numpy as np
from PIL import Image

from clj.data import DataError, images, open_data
from clj.data.order import order

CROPS = {"size": 224, "views": 2, "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
SETS = (
  images.CropSet("image", 224, 2, (0.14, 1.0)),
  images.CropSet("crops", 96, 6, (0.05, 0.14)),
)
ROWS = []


def report(benchmark, name, value, unit, ratio=None):
  row = {"benchmark": benchmark, "name": name, "value": round(value, 1), "unit": unit}
  if ratio is not None:
    row["ratio"] = round(ratio, 2)
  ROWS.append(row)
  print(json.dumps(row), flush=True)


def in_turns(alternatives, batch_size, count, turns):
  """Median images/s of each alternative, a function that opens a stream of batches.

  A stream is opened anew each turn and drawn on for a third of `count` batches before
  the clock starts, so that nothing read ahead is counted and none works beside another.
  """
  rates = {name: [] for name in alternatives}
  for _ in range(turns):
    for name, opened in alternatives.items():
      batches = opened()
      for _ in range(max(1, count // 3)):
        next(batches)
      start = time.perf_counter()
      for _ in range(count):
        next(batches)
      rates[name].append(count * batch_size / (time.perf_counter() - start))
      batches.close()
  return {name: statistics.median(x) for name, x in rates.items()}


def memory(data, batch_size, turns):
  def ours():
    return data.batches(seed=0, batch_size=batch_size)

  def take():
    rng, pictures = np.random.default_rng(0), data.train.held.arrays["image"]
    while True:
      records = rng.integers(0, len(pictures), (16, batch_size))
      for row in records:
        yield np.take(pictures, row, axis=0)

  # As many batches as sixteen look-ups of the order serve, so that these count.
  rates = in_turns({"np.take": take, "clj": ours}, batch_size, 256, turns)
  for name, rate in rates.items():
    report("memory", name, rate, "images/s", rate / rates["np.take"])


@functools.cache
def opened(name, data_dir, threads=0):
  """A data set whose pictures are cropped as CROPS says, opened once in a process."""
  size, views, scale, ratio = CROPS.values()
  entry = {"name": "views", "size": size, "views": views}
  entry |= {"crop_scale": scale, "crop_ratio": ratio}
  section = {"source": name, "data_dir": data_dir or "", "threads": threads}
  return open_data(section | {"augment": {"image": entry}})


def stream(name, data_dir, batch_size, turns, threads):
  data = opened(name, data_dir, threads)
  source = data.train.source

  def ours():
    return data.batches(seed=0, batch_size=batch_size)

  def decode_only():
    def decode(start):
      records = order(1, start + np.arange(16), len(source))
      for record in source.read(records):
        images.decode(record["image"])

    with futures.ThreadPoolExecutor(threads) as pool:
      for start in itertools.count(0, 4 * batch_size):
        list(pool.map(decode, range(start, start + 4 * batch_size, 16)))
        yield from range(4)

  def crop(position):
    source = opened(name, data_dir).train.source
    record = source.read([int(order(2, position, len(source)))])[0]
    sets = [images.CropSet("image", **CROPS)]
    return images.crops(record["image"], sets, 2, position)["image"]

  def processes():
    dataset = grain.MapDataset.range(10**9).map(crop).to_iter_dataset()
    dataset = dataset.batch(batch_size)
    return iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=threads)))

  absl.flags.FLAGS(["input"])  # Grain's workers look at its own flags.
  alternatives = {
    "decode only": decode_only,
    f"clj, {threads} threads": ours,
    f"{threads} worker processes": processes,
  }
  encoded = [record["image"] for record in source.read(range(len(source)))]
  tf_data = tensorflow(encoded, [images.CropSet("image", **CROPS)], batch_size)
  if tf_data:
    alternatives["tf.data"] = tf_data
  rates = in_turns(alternatives, batch_size, 24, turns)
  for name, rate in rates.items():
    report("stream", name, rate, "images/s", rate / rates["decode only"])


def multicrop(name, data_dir, batch_size, turns, threads):
  source = opened(name, data_dir).train.source
  encoded = [record["image"] for record in source.read(range(len(source)))]

  def larger(data):
    file = io.BytesIO()
    picture = Image.fromarray(images.decode(data)).resize((500, 375), Image.BICUBIC)
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()

  for size, pictures in {
    "as they are": encoded,
    "500 x 375": list(map(larger, encoded)),
  }.items():

    def threaded(work, pictures=pictures):
      def chunk(start):
        records = order(1, start + np.arange(16), len(pictures))
        return [work(pictures[r], start + i) for i, r in enumerate(records)]

      def batches():
        with futures.ThreadPoolExecutor(threads) as pool:
          for start in itertools.count(0, 4 * batch_size):
            list(pool.map(chunk, range(start, start + 4 * batch_size, 16)))
            yield from range(4)

      return batches

    alternatives = {
      "decode only": threaded(lambda data, _: images.decode(data)),
      "2 x 224": threaded(lambda data, at: images.crops(data, SETS[:1], 1, at)),
      "2 x 224 + 6 x 96": threaded(lambda data, at: images.crops(data, SETS, 1, at)),
    }
    for label, sets in {"2 x 224": SETS[:1], "2 x 224 + 6 x 96": SETS}.items():
      if tf_data := tensorflow(pictures, sets, batch_size):
        alternatives[f"tf.data, {label}"] = tf_data
    rates = in_turns(alternatives, batch_size, 12, turns)
    for label, rate in rates.items():
      ratio = rate / rates["decode only"]
      report("crops", f"{size}: {label}", rate, "images/s", ratio)


def tensorflow(encoded, sets, batch_size):
  """The usual tf.data pipeline over encoded pictures, or None."""
  try:
    import tensorflow as tf
  except ImportError:
    return None
  tf.config.set_visible_devices([], "GPU")

  def views(data):
    shape = tf.io.extract_jpeg_shape(data)

    def view(one):
      begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape,
        tf.zeros([1, 0, 4]),
        area_range=one.scale,
        aspect_ratio_range=one.ratio,
        use_image_if_no_bounding_boxes=True,
      )
      window = tf.stack([begin[0], begin[1], size[0], size[1]])
      crop = tf.image.decode_and_crop_jpeg(data, window, channels=3)
      crop = tf.image.resize(crop, [one.size] * 2, "bicubic")
      return tf.cast(tf.clip_by_value(crop, 0, 255), tf.uint8)

    return {one.key: tf.stack([view(one) for _ in range(one.views)]) for one in sets}

  dataset = tf.data.Dataset.from_tensor_slices(encoded).shuffle(len(encoded)).repeat()
  dataset = dataset.map(views, tf.data.AUTOTUNE).batch(batch_size)

  def batches():
    yield from dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()

  return batches


def table():
  width = max(len(row["name"]) for row in ROWS)
  print()
  for row in ROWS:
    ratio = f"{row['ratio']:6.2f}" if "ratio" in row else ""
    print(
      f"{row['benchmark']:<8} {row['name']:<{width}} {row['value']:>12,.1f}"
      f" {row['unit']:<10}{ratio}"
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data_dir", help="prepared TFDS data; default TFDS_DATA_DIR")
  parser.add_argument("--photographs", default="caltech101_subset")
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  flags = parser.parse_args()
  if importlib.util.find_spec("tensorflow") is None:
    print("TensorFlow is not installed: nothing is measured beside tf.data")
  start = time.perf_counter()
  try:
    small = opened("cifar10", flags.data_dir)
  except DataError as error:
    print(f"{error}: the embedded shapes instead")
    small = opened("shapes", "")
  small.train.held  # noqa: B018 (what is held is decoded at the first look)
  report("start", small.train.name, time.perf_counter() - start, "s")
  memory(small, 512, flags.turns)
  try:
    stream(flags.photographs, flags.data_dir, 64, flags.turns, flags.threads)
    multicrop(flags.photographs, flags.data_dir, 64, flags.turns, flags.threads)
  except DataError as error:
    print(f"no streaming benchmark: {error}")
  table()


if __name__ == "__main__":
  main()
