"""Layers and helpers that several model families share."""
