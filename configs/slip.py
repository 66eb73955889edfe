"""SLIP, arXiv:2112.12750: CLIP, and SimCLR on two more views of each picture.

    python -m clj.main --config=configs/slip.py             # demo, about 3 minutes
    python -m clj.main --config=configs/slip.py:VARIANT [--config.key=value ...]

variant         data                   published zero-shot on ImageNet, hardware
demo            rendered compositions  two CPU cores
smoke           rendered compositions  two steps at test size
vit_b16_yfcc15m YFCC15M               42.8 (the paper, 25 epochs), 64 V100; not yet run

`demo` is written out; the others say what differs. The keys that CLIP has too are
explained in `demo` of `configs/clip.py`.
"""

from ml_collections import ConfigDict

YFCC15M = 14_600_000  # pairs, about
PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def get_config(variant=None):
  variants = {"demo": demo, "smoke": smoke, "vit_b16_yfcc15m": vit_b16_yfcc15m}
  if (variant or "demo") not in variants:
    raise ValueError(f"no variant {variant!r}; there are: {', '.join(variants)}")
  return ConfigDict(variants[variant or "demo"]()).lock()


def demo():
  """Rendered shapes and what they are called; about three minutes on two CPU cores."""
  return {
    "seed": 0,
    "batch_size": 128,
    "total_steps": 400,
    "log_every": 20,
    "eval_every": 0,
    "checkpoint_every": 200,
    "init_from": "",
    "init_rename": (),
    "profile": "",
    "method": {
      "name": "slip",
      "width": 64,  # of the joint space
      "projector": {  # the head of the two views
        "widths": (128, 64),
        "norm": False,
        "bias": True,
        "last_norm": False,
        "last_bias": True,
        "std": None,
      },
      "weight": 1.0,  # of the two views' loss
      "temperature": 0.1,  # of the two views' loss
      "mask_duplicates": True,
      "probe_classes": 0,
    },
    "model": {
      "image": {"name": "resnet_small", "widths": (24, 48, 96)},
      "text": {"name": "text_small", "vocab": 64, "depth": 0},  # see clip.py
    },
    "data": {
      "source": "shapes/compositions",
      "train_split": "train",
      "test_split": "test",
      "data_dir": "",
      "threads": 0,
      "text": {"tokenizer": "words", "length": 16},
      "size": 32,
      "eval_crop": 1.0,
      "views": 1,
      "crop_scale": (0.9, 1.0),
      "crop_ratio": (3 / 4, 4 / 3),
      "augment": {
        "flip": 0.0,
        "grayscale": 0.0,
        # The two views: so little jitter that colours matter.
        "crops": {
          "size": 32,
          "views": 2,
          "crop_scale": (0.6, 1.0),
          "flip": 0.5,
          "jitter": {"strength": 0.15},
        },
      },
    },
    "optim": {
      "name": "adamw",
      "learning_rate": 4e-3,
      "warmup_fraction": 0.05,
      "b2": 0.98,
      "weight_decay": 0.1,
    },
    "mesh": {"data": -1, "fsdp": 1},
    "evals": {
      "zeroshot": {"templates": ("a {}", "{}")},
      "retrieval": {},
      "zeroshot_seen": {
        "name": "zeroshot",
        "templates": ("a {}", "{}"),
        "data": {"test_split": "seen"},
      },
      "linear_probe": {"final_only": True, "data": {"source": "shapes"}},
    },
  }


def smoke():
  """The real path at test size: two steps on a few rendered shapes."""
  config = demo() | {"batch_size": 16, "total_steps": 2, "log_every": 1}
  config["checkpoint_every"] = 0
  config["method"] |= {"width": 16, "temperature": 0.2}
  config["method"]["projector"] |= {"widths": (32, 16)}
  config["model"] = {
    "image": {"name": "resnet_test", "dtype": "float32"},
    "text": {"name": "text_test", "vocab": 64},
  }
  config["data"] |= {"train_split": "train[:512]", "test_split": "test[:256]"}
  config["optim"] |= {"learning_rate": 1e-3}
  config["evals"] = {"zeroshot": {"templates": ("a {}",)}, "retrieval": {}}
  return config


def vit_b16_yfcc15m():
  """ViT-B/16, 25 epochs of YFCC15M at batch 4096: 42.8, where CLIP alone has 37.6.

  Table 1 of the paper and the authors' code. The learning rate ends at 0 here, at 1e-5
  there.
  """
  config = demo() | {"batch_size": 4096, "total_steps": 25 * YFCC15M // 4096}
  config |= {"log_every": 50, "eval_every": YFCC15M // 4096, "checkpoint_every": 1000}
  config["method"] |= {"width": 512, "mask_duplicates": False}
  config["method"]["projector"] = {
    "widths": (4096, 4096, 256),
    "bias": True,
    "last_norm": False,
    "last_bias": True,
    "std": None,
  }
  big = {"dtype": "bfloat16", "scan": True}
  config["model"] = {
    "image": {"name": "vit_b16", **big, **PIXELS},
    "text": {"name": "clip_vit_b16", "vocab": 49408, **big},
  }
  config["data"] |= {
    "source": "yfcc15m",
    "train_split": "train[:-5000]",
    "test_split": "train[-5000:]",
    "text": {"tokenizer": "bpe_simple_vocab_16e6.txt.gz", "length": 77},
    "size": 224,
    "crop_scale": (0.5, 1.0),
  }
  config["data"]["augment"]["crops"] = {
    "size": 224,
    "views": 2,
    "crop_scale": (0.08, 1.0),
    "flip": 0.5,
    "jitter": {"strength": 1.0, "probability": 0.8, "amounts": (0.4, 0.4, 0.4, 0.1)},
    "grayscale": 0.2,
    "blur": {"probability": 0.5, "sigma": (0.1, 2.0)},
  }
  config["optim"] |= {
    "learning_rate": 3e-3,
    "warmup_fraction": 1 / 25,
    "eps": 1e-8,
    "no_decay": r"(^|/)(bias|scale|gamma|log_scale|cls)$",
  }
  config["evals"] = {
    "zeroshot": {
      "classnames": "imagenet_classnames.txt",
      "data": {"source": "imagenet2012", "test_split": "validation"},
    },
    "retrieval": {},
  }
  return config
