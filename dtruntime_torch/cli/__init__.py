"""The command line, `dtruntime`. It starts without torch; what draws its tables comes with the extra "cli"."""

from __future__ import annotations

import sys

from dtruntime_torch.errors import MissingExtra


def main() -> None:
    """Runs the command that the arguments of this process name, and exits.

    The status is 0 when all is well, 1 when something is damaged or of a later version, differs (`diff`) or stayed that should
    have gone (`prune`, `drop`), 2 when nothing can be said: wrong usage, no
    checkpoint there, a storage that fails, or an extra that is not installed.
    """
    try:
        _run()
    except MissingExtra as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _run() -> None:
    try:
        from dtruntime_torch.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        raise MissingExtra(f'the command line needs {package}: pip install "dtruntime_torch[cli]"') from error
    app()
