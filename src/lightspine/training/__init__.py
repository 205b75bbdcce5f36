"""Training with Lightning. Importing a module of this package imports Lightning, which costs seconds."""
