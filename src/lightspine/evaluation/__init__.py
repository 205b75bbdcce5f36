"""Scores, predictions and features of a checkpoint; nothing here imports Lightning."""

from lightspine.evaluation.batch_inference import InferenceOptions, embed_images, predict_images
from lightspine.evaluation.classification import ClassScore, Prediction, evaluate, predict
from lightspine.evaluation.detection import evaluate_detector
from lightspine.evaluation.predictors import predict_dense
from lightspine.evaluation.report import write_dense_report, write_report
from lightspine.evaluation.segmentation import evaluate_segmenter

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
