"""Fixtures for all tests: one thread, fixed seed, default SIGINT handler."""

import os
import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Background jobs of a shell ignore SIGINT, which some tests send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
