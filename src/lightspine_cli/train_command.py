"""Train a model from a recipe, a YAML file that configures the complete run; flags override it.

Examples:
  lightspine train --config image_folder --data.root PHOTOS --epochs 20 --size 160
  lightspine train --config finetune_image_folder --data.root PHOTOS --model.checkpoint shvit_s1.pth
  lightspine train --config digits_vim_tiny --folder runs/digits --resume

`lightspine recipes` lists the recipes. The folder of the run gets model.safetensors (for `evaluate`,
`predict` and `export`), metrics.csv, curves.png, config.yaml, and the checkpoints best.ckpt and last.ckpt.
"""

import argparse

from lightspine_cli._output import print_text

# LightningCLI parses the arguments.
PASSES_ARGUMENTS_THROUGH = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the common options, for the help text."""
    parser.usage = "lightspine train --config RECIPE [options]"
    run = parser.add_argument_group("run")
    run.add_argument("--config", metavar="RECIPE", help="name of a recipe, or a YAML file")
    run.add_argument("--folder", metavar="DIR", help="output folder (default: runs/MODEL)")
    run.add_argument("--epochs", metavar="N", type=int, help="length of the run")
    run.add_argument("--lr", metavar="RATE", type=float, help="peak learning rate")
    run.add_argument("--batch-size", metavar="N", type=int, help="images per step and device")
    run.add_argument("--size", metavar="N", type=int, help="image size in pixels")
    run.add_argument("--seed", metavar="N", type=int, help="seed of all random numbers (default: 0)")
    run.add_argument(
        "--resume",
        metavar="FILE",
        nargs="?",
        help="resume from a last.ckpt, by default from the one in --folder",
    )
    run.add_argument(
        "--export", choices=("last", "best"), help="epoch whose weights are exported (default: best)"
    )
    run.add_argument("--save-every-steps", metavar="N", type=int, help="also write last.ckpt every N steps")
    run.add_argument(
        "--effective-batch", metavar="N", type=int, help="images per optimizer step, by gradient accumulation"
    )
    run.add_argument("--grad-checkpointing", action="store_true", help="use less memory and more time")
    run.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    run.add_argument("--tensorboard", action="store_true", help="also log to TensorBoard")
    recipe = parser.add_argument_group("options of a recipe (--print_config shows all with their values)")
    recipe.add_argument("--model.model", metavar="NAME", help="model of lightspine or timm")
    recipe.add_argument("--model.checkpoint", metavar="FILE", help="initial weights")
    recipe.add_argument("--data.root", metavar="DIR", help="folder of the images")
    recipe.add_argument("--data.num_workers", metavar="N", help="data loader processes")
    recipe.add_argument("--trainer.accelerator", metavar="NAME", help="cpu, gpu, mps or auto")
    recipe.add_argument("--trainer.devices", metavar="N", help="number of devices")
    recipe.add_argument("--trainer.precision", metavar="NAME", help="32-true, bf16-mixed, 16-mixed, ...")
    more = parser.add_argument_group("more help")
    more.add_argument("--print_config", action="store_true", help="print the complete configuration")
    more.add_argument("--help-all", action="store_true", help="show all options, with those of the Trainer")


def run(args: argparse.Namespace) -> int:
    """Run the training and print its result."""
    if {"-h", "--help"} & set(args.arguments):
        from lightspine_cli.main import parser_of

        # Before Lightning is imported, which takes seconds.
        parser_of("train").print_help()
        return 0

    from lightspine.errors import UsageError

    if not args.arguments:
        raise UsageError(
            "expected --config with a file or the name of a recipe: `lightspine recipes` lists them, "
            "`lightspine train --help` shows examples"
        )

    # Import late, because Lightning takes seconds to import.
    from lightning.pytorch.utilities import rank_zero_only

    from lightspine.training.cli import main

    result = main(args.arguments)
    # Every process of a distributed run comes here.
    if getattr(rank_zero_only, "rank", 0) != 0:
        return 0
    score = result.score_name.removeprefix("val_")
    print_text(
        f"{result.model}: {score} {result.score:.2f} % on the held-out images after {result.seconds:.0f} s"
    )
    print_text(f"{result.weights}: the model; metrics, curves and checkpoints are in the same folder")
    return 0
