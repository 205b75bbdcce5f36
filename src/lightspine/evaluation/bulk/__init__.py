"""Predictions and features of any number of images, on many devices, resumable after a kill.

A plain loop over a data loader: it starts without the ten seconds that Lightning takes to load, and what it
has to survive is kept in files, one per so many images, and not in a trainer.
"""

from lightspine.evaluation.bulk.images import embed_images, predict_images
from lightspine.evaluation.bulk.options import InferenceOptions

__all__ = ["InferenceOptions", "embed_images", "predict_images"]
