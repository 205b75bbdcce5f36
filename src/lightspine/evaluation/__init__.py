"""Scores and predictions of a checkpoint; nothing here imports Lightning."""

from lightspine.evaluation.evaluate import evaluate, write_report
from lightspine.evaluation.predict import ClassScore, Prediction, predict

__all__ = ["ClassScore", "Prediction", "evaluate", "predict", "write_report"]
