"""Losses over the global batch, as pure functions on embeddings."""

import inspect

import jax

from clj.losses.contrastive import clip as clip
from clj.losses.contrastive import info_nce as info_nce
from clj.losses.contrastive import l2_normalize as l2_normalize
from clj.losses.contrastive import nt_xent as nt_xent
from clj.losses.contrastive import siglip as siglip
from clj.losses.gradcache import encode_in_chunks as encode_in_chunks
from clj.losses.momentum import enqueue as enqueue
from clj.losses.momentum import moco as moco
from clj.losses.momentum import moco_v3 as moco_v3
from clj.losses.multimodal import audioclip as audioclip
from clj.losses.multimodal import clip_distill as clip_distill
from clj.losses.ranking import bpr as bpr
from clj.losses.ranking import l2_penalty as l2_penalty
from clj.losses.ranking import sampled_softmax as sampled_softmax
from clj.losses.ranking import sgl as sgl
from clj.losses.redundancy import barlow_twins as barlow_twins
from clj.losses.redundancy import koleo as koleo
from clj.losses.redundancy import vicreg as vicreg
from clj.losses.redundancy import vicreg_terms as vicreg_terms
from clj.losses.self_distillation import byol as byol
from clj.losses.self_distillation import center_target as center_target
from clj.losses.self_distillation import dino as dino
from clj.losses.self_distillation import gram as gram
from clj.losses.self_distillation import ibot as ibot
from clj.losses.self_distillation import ibot_tokens as ibot_tokens
from clj.losses.self_distillation import masked_weights as masked_weights
from clj.losses.self_distillation import push as push
from clj.losses.self_distillation import sinkhorn as sinkhorn
from clj.losses.self_distillation import swav as swav
from clj.losses.self_distillation import swav_codes as swav_codes
from clj.losses.self_distillation import update_center as update_center
from clj.losses.sequence import cpc as cpc
from clj.losses.supervised import nt_xent_labels as nt_xent_labels
from clj.losses.supervised import supcon as supcon
from clj.losses.text import dense_retrieval as dense_retrieval
from clj.losses.text import simcse as simcse
from clj.losses.triplet import triplet as triplet
from clj.losses.triplet import triplet_batch_all as triplet_batch_all
from clj.losses.triplet import triplet_batch_hard as triplet_batch_hard
from clj.losses.triplet import triplet_semihard as triplet_semihard

# By this scope the plan tells what they cost from what the towers do, which run inside
# of `encode_in_chunks`.
for _name, _function in list(globals().items()):
  if inspect.isfunction(_function) and _name != "encode_in_chunks":
    globals()[_name] = jax.named_scope("loss")(_function)
del _name, _function
