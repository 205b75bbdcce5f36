"""Resumable batch inference: predictions or features of any number of images.

A plain loop over a data loader, without Lightning, whose import takes ten seconds. The state that has to
survive a kill is kept in files, one per `part_size` images.
"""

from lightspine.evaluation.batch_inference.run import InferenceOptions, embed_images, predict_images

__all__ = ["InferenceOptions", "embed_images", "predict_images"]
