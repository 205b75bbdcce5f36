"""Measurements: multiply-adds, latency, and the system they were taken on."""

from lightspine.benchmark.latency import Latency as Latency
from lightspine.benchmark.latency import measure_latency_ms as measure_latency_ms
from lightspine.benchmark.macs import Macs as Macs
from lightspine.benchmark.macs import count_macs as count_macs
from lightspine.benchmark.system import describe_system as describe_system

__all__ = ["Latency", "Macs", "count_macs", "describe_system", "measure_latency_ms"]
