"""One way to tell a person what is wrong with what they gave us."""

from __future__ import annotations

import difflib
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from functools import wraps


class InputError(Exception):
    """Something a person gave (a file, a key, a value) cannot be used.

    The message is one line that names the file, key or value and says what to do.
    Commands print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


LISTED = 40  # names in a message


def suggest(wrong: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known ones, or all of them.

    >>> suggest("widht", ["width", "stem"])
    'did you mean width?'
    >>> suggest("vgg", ["iresnet50", "slimresnet"])
    'known are iresnet50, slimresnet'
    """
    known = sorted(known)
    if not known:
        return "there are none"
    near = difflib.get_close_matches(wrong, known)
    if near:
        return f"did you mean {' or '.join(near)}?"
    shown = known[:LISTED] + ([f"and {len(known) - LISTED} more"] if len(known) > LISTED else [])
    return f"known are {', '.join(shown)}"


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command's ``main`` so that mistakes of its user end in one line and exit code 2."""

    @wraps(main)
    def run(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        except (InputError, ArgumentError) as error:
            sys.exit(fail(" ".join(str(error).split())))
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            where = f"{error.filename}: " if error.filename else ""
            sys.exit(fail(f"{where}{error.strerror or error}"))
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            sys.exit(130)

    return run


def fail(message: str) -> int:
    """Print ``message`` as one error line and return the exit code that goes with it."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2
