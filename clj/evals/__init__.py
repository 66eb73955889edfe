"""Evaluations of frozen features: arrays in, plain numbers out."""

from clj.evals import knn as knn
