"""Entry point of the command line: run a command, report errors in one sentence and by the exit status.

This module imports neither torch nor `lightspine`, so that `--help` answers at once.
"""

import argparse
import difflib
import importlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from lightspine_cli._output import escape

COMMANDS = {
    "list": "list models with parameters, multiply-adds, resolution and published accuracy",
    "info": "show details of a model or a checkpoint file",
    "weights": "list published weights, cached and available; check the cached files",
    "doctor": "show versions, devices and scan backends; check the kernels on this machine",
    "predict": "predict classes, objects or segmentation maps of images",
    "embed": "compute features of images",
    "recipes": "list training recipes with their published scores",
    "train": "train a model from a recipe",
    "evaluate": "evaluate a checkpoint on annotated images",
    "compare": "train several models on the same images and compare them",
    "convert-data": "convert VOC, YOLO, LabelMe or mask datasets to what train reads",
    "show": "draw images with their ground truth as the trainer sees them",
    "convert": "convert an official checkpoint to safetensors",
    "export": "export a model to ONNX, torch.export or Core ML",
    "bench": "benchmark models (lightspine, timm) or scan operators: latency and memory",
    "profile": "profile a model per module and per operator",
    "report": "create an HTML report from results of bench",
    "analyze": "draw receptive fields, Grad-CAM, attention maps, context maps and head similarity",
    "demo": "train one model of each family on handwritten digits and compare them",
}
USAGE_STATUS = 2
INTERRUPT_STATUS = 130


class SentenceParser(argparse.ArgumentParser):
    """Argument parser that reports an error as one sentence, without the usage block."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        command = self.prog.partition(" ")[2]
        say(
            f"{message} (see `lightspine {command} --help`)"
            if command
            else f"{message} (see `lightspine --help`)"
        )
        raise SystemExit(USAGE_STATUS)


def say(sentence: str) -> None:
    """Print an error message to standard error."""
    print(f"lightspine: {escape(sentence)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments of the command line; by default `sys.argv[1:]`.

    Returns:
        The exit status: 0 for success, 1 for a failure, 2 for a usage error, 130 for an interrupt.
    """
    if argv is None:
        if "LIGHTSPINE_LAUNCHER_PID" in os.environ:
            # A rank of a training run: at Ctrl-C the rank that started it ends it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        _print_any_name()
    status = _run(list(sys.argv[1:] if argv is None else argv), own_process=argv is None)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _handle_broken_pipe()
    return status


def _print_any_name() -> None:
    """Print file and class names that the encoding of standard output lacks without an error.

    Bytes of a file name that are not UTF-8 are written as they are; other encodings get escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def _run(arguments: list[str], own_process: bool) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    handler = _log_to_stderr(debug)
    try:
        return _dispatch(arguments, own_process)
    except SystemExit as exit_:
        return _status_of(exit_)
    except BrokenPipeError:
        return _handle_broken_pipe()
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPT_STATUS
    except Exception as error:
        if debug:
            sys.stderr.write(escape(traceback.format_exc(), keep_newlines=True))
        return _report(error, debug)
    finally:
        logging.getLogger("lightspine").removeHandler(handler)


def _handle_broken_pipe() -> int:
    # The reader of the pipe, such as `head`, has exited. The interpreter flushes standard output again at
    # exit, which must not fail.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


class _EscapingFormatter(logging.Formatter):
    """Escapes control characters in the message, not in the lines of a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return escape(super().formatMessage(record))


def _log_to_stderr(debug: bool) -> logging.Handler:
    """Send log messages of the library to standard error; standard output is for results."""
    handler = logging.StreamHandler()
    handler.setFormatter(_EscapingFormatter())
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
        # `--help` and `--version` exit here; any other option before a command is an error.
        parser.parse_args(arguments)
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        parser.error(_unknown_command(command))
    module = importlib.import_module(_module_name(command))
    # Reports store the arguments as given.
    parsed = argparse.Namespace(arguments=rest)
    if not getattr(module, "PASSES_ARGUMENTS_THROUGH", False):
        parsed = parser_of(command).parse_args(rest, parsed)
    if own_process:
        # After the arguments are parsed, because the import loads torch.
        from lightspine import keep_freed_memory

        keep_freed_memory()
    return int(module.run(parsed))


def _module_name(command: str) -> str:
    return f"lightspine_cli.{command.replace('-', '_')}_command"


def parser_of(command: str) -> SentenceParser:
    """Create the argument parser of a command.

    Args:
        command: one of `COMMANDS` that does not pass its arguments through.
    """
    module = importlib.import_module(_module_name(command))
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
        epilog=f"commands:\n{commands}\n\n`lightspine COMMAND --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightspine {_version()}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser


def _version() -> str:
    # From the metadata of the distribution, because `import lightspine` loads torch.
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
    # Look up the classes only if their modules have been imported.
    for name in ("lightspine.errors", "lightspine_runtime.errors"):
        errors = sys.modules.get(name)
        if errors is not None and isinstance(error, errors.LightspineError):
            if not getattr(error, "is_reported", False):
                say(_one_line(error))
            return int(error.exit_status)
    resources = sys.modules.get("lightspine.utils.resource_errors")
    if resources is not None and (sentence := resources.describe_resource_error(error)):
        say(sentence)
        return 1
    hint = "" if debug else " (--debug shows the traceback)"
    say(f"{type(error).__name__}: {_one_line(error)}{hint}")
    return 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no message"
