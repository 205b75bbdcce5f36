"""Scores and predictions of detectors and segmenters."""

from lightspine.evaluation.dense.detector import evaluate_detector as evaluate_detector
from lightspine.evaluation.dense.predict import predict_dense as predict_dense
from lightspine.evaluation.dense.report import write_dense_report as write_dense_report
from lightspine.evaluation.dense.segmenter import evaluate_segmenter as evaluate_segmenter

__all__ = ["evaluate_detector", "evaluate_segmenter", "predict_dense", "write_dense_report"]
