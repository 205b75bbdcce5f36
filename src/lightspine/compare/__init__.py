"""Several models on the same images: trained, measured and shown side by side.

Import from the modules here: `compare` and `runs` load Lightning, `names` and `results` do not.
"""
