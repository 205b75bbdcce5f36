"""Command line of lightspine, a package of its own so that `--help` does not import torch."""
