"""Train from a recipe: `lightspine train --config NAME_OR_PATH [--model.lr 1e-3 ...]`."""

import argparse

# LightningCLI parses the arguments.
PASSES_ARGUMENTS_THROUGH = True


def run(args: argparse.Namespace) -> int:
    """Run the training and print its result."""
    from lightspine.errors import UsageError

    if not args.arguments:
        raise UsageError(
            "expected --config with a file or the name of a recipe: `lightspine recipes` lists them"
        )

    # Import late, because Lightning takes seconds to import.
    from lightspine.training.cli import main

    result = main(args.arguments)
    score = result.score_name.removeprefix("val_")
    print(f"{result.model}: {score} {result.score:.2f} % on the held-out images after {result.seconds:.0f} s")
    print(f"{result.weights}: the model; metrics, curves and checkpoints are in the same folder")
    return 0
