"""The entry point ``subspan``; torch and transformers are imported by the commands, not for ``--help``."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import itertools
import logging
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]

#: Characters of a message.
_LONGEST = 2000

#: Modules of this folder, one a command: add_command(commands, parser_class) and run(arguments) -> exit status.
_COMMANDS = ("pretrain", "sweep", "plan", "checkpoint", "merge", "spectrum", "methods", "bench")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments (default: those of the process).

    Returns:
        Exit status: 0; 1 for settings or data that cannot be honoured; 2 for arguments that cannot be parsed; 128 and
        the number of the signal when a run was stopped.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = _parser()
        _check_settings_files(argv)
        arguments = parser.parse_args([_with_underscores(argument) for argument in argv])
        _quiet_libraries()
        return _command(arguments.subcommand).run(arguments[arguments.subcommand])
    except KeyboardInterrupt:
        print("\nStopped at once; a run continues from its last checkpoint.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"error: {error}. Install what the command line needs: pip install 'subspan[train]'", file=sys.stderr)
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        _say(f"error: {_brief(str(error))}\n")
        return 1


def _say(message: str) -> None:
    """Print an error, once where all processes of a run meet it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from subspan.train.processes import first_to_say

        if not first_to_say(message):
            return
    print(message, end="", file=sys.stderr, flush=True)


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from subspan.train.config import PretrainConfig

    settings = ["config", "grid", "print_config", *(field.name for field in dataclasses.fields(PretrainConfig))]

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            """End with the message alone, and the closest setting beside an unknown one."""
            # In a file, an unknown setting is reported by the parser above the command.
            unknown = re.search(
                r"unrecognized arguments: --([\w.]+)|mand '(\w+)' does not accept option '([\w.]+)'", message
            )
            command = self.prog.replace(" [options]", "")
            if unknown:
                name = unknown[1] or unknown[3]
                command = f"{command} {unknown[2]}" if unknown[2] else command
                # The parser that stumbles over an argument is the one of the command.
                known = settings if unknown[3] else [action.dest for action in self._actions]
                close = difflib.get_close_matches(name, known, n=1)
                message = f"unknown setting {name!r}.{f' Did you mean {close[0]!r}?' if close else ''}"
            _say(f"error: {_brief(message)}\nAll settings: {command} --help\n")
            self.exit(2)
            raise AssertionError("exit does not return")

    parser = Parser(
        prog="subspan",
        version=importlib.metadata.version("subspan"),
        description="Train large networks inside small subspaces.",
        epilog="Example: subspan pretrain --method galore --data texts/ --steps 1000 --output runs/first",
    )
    commands = parser.add_subcommands(required=True, title="commands")
    for name in _COMMANDS:
        _command(name).add_command(commands, Parser)
    return parser


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"subspan.cli.{name}")


def _with_underscores(argument: str) -> str:
    """``--batch-size=8`` as ``--batch_size=8``: both spellings are taken."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _check_settings_files(argv: list[str]) -> None:
    """Look at the files given with --config; one that is not there is reported by the parser."""
    from subspan.train.settings_file import check_settings_file

    names = [name for option, name in itertools.pairwise(argv) if option == "--config"]
    names += [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    for name in names:
        if "\0" not in name and (path := Path(name).expanduser()).is_file():
            check_settings_file(path)


def _brief(message: str) -> str:
    """A message without the middle, where a value in it is as long as a file, and without what steers a terminal."""
    message = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in message)
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"


def _quiet_libraries() -> None:
    """Keep libraries from writing about themselves between the lines of a run."""
    # torchao, which transformers imports where it is installed, reports kernels that a CPU build does not have.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as transformers_logging
    except ModuleNotFoundError:
        return
    transformers_logging.disable_progress_bar()
