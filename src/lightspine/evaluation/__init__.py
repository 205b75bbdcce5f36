"""Evaluate and predict with classifiers, detectors and segmenters; without Lightning."""

from lightspine.evaluation.batch_inference import InferenceOptions, embed_images, predict_images
from lightspine.evaluation.classification import ClassScore, Prediction, evaluate, predict
from lightspine.evaluation.detection import evaluate_detector
from lightspine.evaluation.predictors import DensePrediction, predict_dense
from lightspine.evaluation.report import write_dense_report, write_report
from lightspine.evaluation.segmentation import evaluate_segmenter

__all__ = [
    "ClassScore",
    "DensePrediction",
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
