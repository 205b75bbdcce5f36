"""Scores, predictions and features of a checkpoint; nothing here imports Lightning."""

from lightspine.evaluation.bulk import InferenceOptions, embed_images, predict_images
from lightspine.evaluation.dense import (
    evaluate_detector,
    evaluate_segmenter,
    predict_dense,
    write_dense_report,
)
from lightspine.evaluation.evaluate import evaluate
from lightspine.evaluation.predict import ClassScore, Prediction, predict
from lightspine.evaluation.report import write_report

__all__ = [
    "ClassScore",
    "InferenceOptions",
    "Prediction",
    "embed_images",
    "evaluate",
    "evaluate_detector",
    "evaluate_segmenter",
    "predict",
    "predict_dense",
    "predict_images",
    "write_dense_report",
    "write_report",
]
