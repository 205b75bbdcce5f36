"""Benchmarks: latency, peak memory and multiply-adds of models, with a description of the system."""

from lightspine.benchmark.interleaved_timing import Timing as Timing
from lightspine.benchmark.interleaved_timing import measure_latency_ms as measure_latency_ms
from lightspine.benchmark.macs import Macs as Macs
from lightspine.benchmark.macs import count_macs as count_macs
from lightspine.benchmark.system import describe_system as describe_system

__all__ = ["Macs", "Timing", "count_macs", "describe_system", "measure_latency_ms"]
