"""Helpers that several packages share: atomic file writes, devices, progress bars."""
