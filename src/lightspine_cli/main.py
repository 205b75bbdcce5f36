"""The entry point: finds the command, runs it and turns every failure into one sentence and an exit status.

Nothing here imports torch or `lightspine`, whose import loads torch; a command does so when it runs.
"""

import argparse
import difflib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "list": "our models: parameters, multiply-adds, resolution, published accuracy",
    "info": "the facts of one model or of one checkpoint file",
    "doctor": "versions, devices and which scan backends can run here, and why not",
    "predict": "classes, objects or class maps of image files, a few or any number",
    "embed": "features of any number of images",
    "recipes": "the training recipes, with their published scores",
    "train": "train from a recipe",
    "evaluate": "score a checkpoint on annotated images",
    "compare": "train several models on the same images: one table, one plot, the checkpoints",
    "convert": "turn an official checkpoint into our safetensors",
    "export": "write a model as ONNX or for torch.export, compared with PyTorch",
    "bench": "measure models, ours and timm's, scans and exported files on this machine: time and memory",
    "profile": "where the time of one model goes: per module and per operator",
    "report": "one HTML page of charts and tables from results of bench",
    "analyze": "pictures of what a network sees: receptive fields, Grad-CAM, attention, contexts, heads",
    "demo": "train all five families on handwritten digits and compare them",
}
USAGE_STATUS = 2
INTERRUPT_STATUS = 130


class SentenceParser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as one sentence, without the usage block."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and leave with the status of a wrong call."""
        command = self.prog.partition(" ")[2]
        say(
            f"{message} (see `lightspine {command} --help`)"
            if command
            else f"{message} (see `lightspine --help`)"
        )
        raise SystemExit(USAGE_STATUS)


def say(sentence: str) -> None:
    """Print a sentence about a failure to the standard error."""
    print(f"lightspine: {sentence}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted.
    """
    status = _run(list(sys.argv[1:] if argv is None else argv), own_process=argv is None)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_left()
    return status


def _run(arguments: list[str], own_process: bool) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    handler = _log_to_stderr(debug)
    try:
        return _dispatch(arguments, own_process)
    except SystemExit as exit_:
        return _status_of(exit_)
    except BrokenPipeError:
        return _reader_left()
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPT_STATUS
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error, debug)
    finally:
        logging.getLogger("lightspine").removeHandler(handler)


def _reader_left() -> int:
    # Such as `head`. The interpreter flushes the standard output once more at its end: give it a sink.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _log_to_stderr(debug: bool) -> logging.Handler:
    """Show what the library reports on its way; the standard output is for the results."""
    handler = logging.StreamHandler()
    logger = logging.getLogger("lightspine")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    return handler


def _dispatch(arguments: list[str], own_process: bool) -> int:
    parser = _top_parser()
    if not arguments:
        parser.print_help()
        return USAGE_STATUS
    if arguments[0].startswith("-"):
        # `--help` and `--version` leave inside; any other option before a command is a mistake.
        parser.parse_args(arguments)
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        parser.error(_unknown_command(command))
    module = importlib.import_module(f"lightspine_cli.{command}_command")
    # Commands that write a report record the arguments as given.
    parsed = argparse.Namespace(arguments=rest)
    if not getattr(module, "PASSES_ARGUMENTS_THROUGH", False):
        parsed = parser_of(command).parse_args(rest, parsed)
    if own_process:
        # After the arguments are parsed, because the import loads torch.
        from lightspine import keep_freed_memory

        keep_freed_memory()
    return int(module.run(parsed))


def parser_of(command: str) -> SentenceParser:
    """Return the parser of a command that does not pass its arguments through.

    Args:
        command: one of `COMMANDS`.
    """
    module = importlib.import_module(f"lightspine_cli.{command}_command")
    parser = SentenceParser(
        prog=f"lightspine {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def _top_parser() -> SentenceParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = SentenceParser(
        prog="lightspine",
        usage="lightspine [--version] [--debug] COMMAND ...",
        description="Efficient vision backbones: VMamba, Vim, EfficientViM, SHViT, EfficientMod.",
        epilog=f"commands:\n{commands}\n\n`lightspine COMMAND --help` tells a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightspine {_version()}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser


def _version() -> str:
    # The distribution's own record: `import lightspine` would load torch to say one number.
    from importlib.metadata import version

    return version("lightspine")


def _unknown_command(command: str) -> str:
    close = difflib.get_close_matches(command, COMMANDS, n=3, cutoff=0.5)
    hint = f"; the closest are {', '.join(close)}" if close else f"; there are {', '.join(COMMANDS)}"
    return f"unknown command {command!r}{hint}"


def _status_of(exit_: SystemExit) -> int:
    if exit_.code is None or isinstance(exit_.code, int):
        return exit_.code or 0
    say(str(exit_.code))
    return 1


def _report(error: Exception, debug: bool) -> int:
    # If the error is one of these, its module has been imported.
    for name in ("lightspine.errors", "lightspine_runtime.errors"):
        errors = sys.modules.get(name)
        if errors is not None and isinstance(error, errors.LightspineError):
            say(_one_line(error))
            return int(error.exit_status)
    hint = "" if debug else " (--debug shows the traceback)"
    say(f"{type(error).__name__}: {_one_line(error)}{hint}")
    return 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no message"
