"""Losses over the global batch, as pure functions on embeddings."""

from clj.losses.contrastive import clip as clip
from clj.losses.contrastive import info_nce as info_nce
from clj.losses.contrastive import l2_normalize as l2_normalize
from clj.losses.contrastive import nt_xent as nt_xent
from clj.losses.contrastive import siglip as siglip
