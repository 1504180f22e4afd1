"""The command line. Errors are caught here, once: message and hint on standard error, the exit code from the error.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted. Commands are imported when they are run, and import what is
heavy when they need it: `lavatar --help` loads neither torch nor ray nor mlflow nor sqlalchemy.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from lavatar.errors import LavatarError
from lavatar.masking import masked
from lavatar.platform.output import printable

COMMANDS: dict[str, tuple[str, str]] = {
    "subjects": ("lavatar.platform.commands.subjects:subjects", "The people: add, list, show, remove."),
    "submit": ("lavatar.platform.commands.submit:submit", "Make an avatar drivable by an actor, or many by many."),
    "jobs": (
        "lavatar.platform.commands.jobs:jobs",
        "What was submitted: list, show, logs, cancel, resume, retry, delete.",
    ),
    "models": (
        "lavatar.platform.commands.models:models",
        "The registered models: list, show, compare, promote, rollback, delete, export, import.",
    ),
    "runs": ("lavatar.platform.commands.runs:runs", "What was recorded of runs: diff."),
    "reproduce": (
        "lavatar.platform.commands.reproduce:reproduce",
        "Do a finished job or stage again and compare the figures.",
    ),
    "cluster": (
        "lavatar.platform.commands.cluster:cluster",
        "A Ray cluster that outlives its commands: up, join, status, down, files.",
    ),
    "reenact": ("lavatar.platform.commands.reenact:reenact", "Drive an avatar by any video of its actor."),
    "evaluate": ("lavatar.platform.commands.evaluate:evaluate", "Measure a finished avatar or pair again."),
    "report": (
        "lavatar.platform.commands.report:report",
        "Write a job's page: videos, figures, curves, pictures, cost, troubles.",
    ),
    "compare": ("lavatar.platform.commands.report:compare", "Write two jobs' page: one beside the other."),
    "bench": (
        "lavatar.platform.commands.bench:bench",
        "Measure how fast this machine does it, beside a plain reference.",
    ),
    "benchmark": ("lavatar.platform.commands.benchmark:benchmark", "Compare methods, trained and measured alike."),
    "sweep": ("lavatar.platform.commands.sweep:sweep", "Search for better settings, and train with the best."),
    "weights": ("lavatar.platform.commands.weights:weights", "The pretrained files: list, fetch."),
    "doctor": ("lavatar.platform.commands.doctor:doctor", "Check this machine and the home; mend what a crash left."),
    "gc": ("lavatar.platform.commands.gc:gc", "Free what no job refers to."),
    "ui": ("lavatar.platform.commands.ui:ui", "Show runs and models in the browser (MLflow)."),
}
"""Name: where it lives, and its line in --help (a test compares it with the command's own)."""

_FAULT = "This is a fault of lavatar. Run it again with --debug to see where it happened."
DEBUG_VARIABLE = "LAVATAR_DEBUG"


class LazyGroup(click.Group):
    """Knows its commands by name; imports one when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"The commands are {', '.join(COMMANDS)}."
            raise click.UsageError(f"there is no command {args[0]!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="lavatar", message="%(prog)s %(version)s")
def group(debug: bool) -> None:
    """Head avatars from a video, driven by anyone else's video.

    Two videos are enough to begin:

    \b
        lavatar subjects add anna anna.mp4
        lavatar subjects add ben ben.mp4
        lavatar submit --avatar anna --actor ben --recipe tiny

    Everything lies in LAVATAR_HOME (default ~/.lavatar).
    """
    from lavatar.cluster.environment import contain, take_over
    from lavatar.platform.home import Home

    take_over()
    contain(Home.from_environment().root)


def main(args: Sequence[str] | None = None) -> None:
    """The console script."""
    sys.exit(run(list(sys.argv[1:] if args is None else args)))


def run(args: list[str]) -> int:
    """Run a command line; its exit code."""
    args, debug = _take_debug(args)
    try:
        result = group.main(args, prog_name="lavatar", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except LavatarError as error:
        return _show(error, args, debug)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return _answer(args, error.format_message(), "See --help.", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return _answer(args, "interrupted", "", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes at exit
        return 1
    except Exception as error:
        return _show_unexpected(error, args, debug)


def _take_debug(args: list[str]) -> tuple[list[str], bool]:
    """--debug is taken anywhere on the line, so that it can be added at the end of the one that failed."""
    end = args.index("--") if "--" in args else len(args)
    rest = [a for a in args[:end] if a != "--debug"] + args[end:]
    return rest, len(rest) < len(args) or bool(os.environ.get(DEBUG_VARIABLE))


def _show(error: LavatarError, args: list[str], debug: bool) -> int:
    from lavatar.errors import Interrupted

    if debug:
        _show_traceback(error)
    word = "" if isinstance(error, Interrupted) else "error: "
    click.secho(printable(f"{word}{error.message}"), err=True, fg="red" if word else "yellow")
    if error.hint:
        click.echo(f"  {printable(error.hint)}", err=True)
    if getattr(error, "answered", False):
        return error.exit_code
    return _answer(args, error.message, error.hint, error.exit_code)


def _answer(args: list[str], message: str, hint: str, code: int) -> int:
    """With --json whoever reads standard output gets an object, however the command ended. Returns the exit code."""
    if "--json" in args:
        from lavatar.platform.output import answer_json

        answer_json({"error": {"message": message, "hint": hint, "exit_code": code}})
    return code


def _show_unexpected(error: Exception, args: list[str], debug: bool) -> int:
    if debug:
        _show_traceback(error)
    text = masked((str(error).strip().splitlines() or [""])[0])
    click.secho(printable(f"internal error: {type(error).__name__}: {text}"), err=True, fg="red")
    if not debug:
        click.echo(f"  {_FAULT}", err=True)
    return _answer(args, f"{type(error).__name__}: {text}", _FAULT, 1)


def _show_traceback(error: BaseException) -> None:
    click.echo(masked("".join(traceback.format_exception(error))), err=True)


if __name__ == "__main__":
    main()
