"""Helpers shared by several packages: files, image files, devices, seeding, progress bars."""
