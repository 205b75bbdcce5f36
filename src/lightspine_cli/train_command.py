"""Train from a recipe: `lightspine train --config NAME_OR_PATH [--model.lr 1e-3 ...]`."""

import argparse

# The recipe's own parser knows every option, so the arguments reach it as they are.
PASSES_ARGUMENTS_THROUGH = True


def run(args: argparse.Namespace) -> int:
    """Hand the arguments over to the training's own parser, and tell what came of it."""
    from lightspine.errors import UsageError

    if not args.arguments:
        raise UsageError(
            "expected --config with a file or the name of a recipe: `lightspine recipes` lists them"
        )

    # Lightning takes seconds to load: only now.
    from lightspine.training.cli import main

    result = main(args.arguments)
    score = result.score_name.removeprefix("val_")
    print(f"{result.model}: {score} {result.score:.2f} % on the held-out images after {result.seconds:.0f} s")
    print(f"{result.weights}: the model; metrics, curves and checkpoints are beside it")
    return 0
