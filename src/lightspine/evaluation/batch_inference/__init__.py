"""Resumable batch inference: predictions and features of any number of images."""

from lightspine.evaluation.batch_inference.run import InferenceOptions, embed_images, predict_images

__all__ = ["InferenceOptions", "embed_images", "predict_images"]
