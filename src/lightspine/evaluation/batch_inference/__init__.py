"""Resumable batch inference: predictions or features of any number of images.

A plain loop over a data loader, without Lightning, whose import takes ten seconds. Finished results are saved
in one file per `part_size` images, so that a killed run can be resumed.
"""

from lightspine.evaluation.batch_inference.run import InferenceOptions, embed_images, predict_images

__all__ = ["InferenceOptions", "embed_images", "predict_images"]
