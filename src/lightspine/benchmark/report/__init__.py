"""The page of `lightspine report`: charts and tables of result files, in one file that needs nothing else."""

from lightspine.benchmark.report.write import Report as Report
from lightspine.benchmark.report.write import write_report as write_report

__all__ = ["Report", "write_report"]
