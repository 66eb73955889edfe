"""SimCLR, arXiv:2002.05709: every recipe whole, one function each.

    python -m clj.main --config=configs/simclr.py            # demo, about 3 minutes
    python -m clj.main --config=configs/simclr.py:VARIANT

variant            data                hardware, published result
demo               embedded shapes     2 CPU cores
smoke              embedded shapes     two steps at test size
cifar10_cpu        CIFAR-10            2 CPU cores, 15 minutes
cifar10_r18        CIFAR-10            one GPU; kNN .848 at 200 epochs (lightly's table)
cifar10_r18_1000   CIFAR-10            the same for 1000 epochs; about 91 linear
imagenet_r50       ImageNet            128 TPU v3 cores; 64.5 linear at 100 epochs
imagenet_r50_1000  ImageNet            the paper's 1000 epochs: 69.1 linear
imagenet_r50_x2    ImageNet            width 2x, 1000 epochs: 74.2 linear
imagenet_r50_x4    ImageNet            width 4x, 1000 epochs: 76.6 linear
folder             your own pictures   --config.data.source=folder:/path

What we measured ourselves is in the README's table.
"""

from ml_collections import ConfigDict


def get_config(variant=None):
  variants = {
    "demo": demo,
    "smoke": smoke,
  }
  if (variant or "demo") not in variants:
    raise ValueError(f"no variant {variant!r}; there are: {', '.join(variants)}")
  return variants[variant or "demo"]().lock()


def demo():
  """A small network on rendered shapes; about three minutes on two CPU cores."""
  c = ConfigDict()
  c.seed = 0
  c.batch_size = 128  # the global batch
  c.total_steps = 400
  c.log_every = 20
  c.eval_every = 200
  c.checkpoint_every = 100
  c.init_from = ""  # workdir, WORKDIR/checkpoints/STEP, or a .safetensors file
  c.init_rename = ()  # pairs (regex, replacement) on the names found there
  c.profile = ""  # "10:15" traces these steps for TensorBoard
  c.method = ConfigDict(
    {
      "name": "simclr",
      "temperature": 0.1,
      "projector": {"widths": (128, 64)},
      "probe_classes": 0,  # classes of an online linear probe; 0: none
    }
  )
  c.model = ConfigDict({"name": "resnet_small", "widths": (24, 48, 96)})
  c.data = ConfigDict(
    {
      "source": "shapes",
      "train_split": "train",
      "test_split": "test",
      "data_dir": "",  # of TFDS; "": the environment's TFDS_DATA_DIR, else its default
      "threads": 0,  # that decode pictures; 0: as many as there are cores
      "size": 32,
      "views": 2,
      "crop_scale": (0.4, 1.0),
      "crop_ratio": (3 / 4, 4 / 3),
      "augment": {"flip": 0.5, "jitter": {"strength": 0.5}, "grayscale": 0.2},
    }
  )
  c.optim = ConfigDict(
    {
      "name": "sgd",
      "learning_rate": 0.3,
      "warmup_fraction": 0.05,
    }
  )
  c.mesh = ConfigDict({"data": -1, "fsdp": 1})  # -1: all devices that remain
  c.evals = ConfigDict(
    {
      "knn": {"k": 200, "temperature": 0.1},
      "knn20": {"name": "knn", "k": 20, "temperature": 0.07},
    }
  )
  return c


def smoke():
  """The real path at test size: two steps on a few rendered shapes."""
  c = demo()
  c.batch_size = 16
  c.total_steps = 2
  c.log_every = 1
  c.eval_every = 0
  c.checkpoint_every = 0
  c.model = ConfigDict({"name": "resnet_test"})
  c.data.train_split = "train[:512]"
  c.data.test_split = "test[:256]"
  c.evals = ConfigDict({"knn": {"k": 20, "temperature": 0.1}})
  return c
