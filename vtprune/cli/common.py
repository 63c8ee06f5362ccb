"""What commands share: errors as one sentence, packages they need, places to write to, reports to print."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from vtprune.evals.report import Report

F = TypeVar("F", bound=Callable[..., Any])


def sentence(command: F) -> F:
    """Turn an expected error into one sentence on stderr and exit status 2; a bug keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        if sys.stderr.isatty():  # the libraries and the model take seconds to load: say at once that it has begun
            typer.secho(f"vtprune {command.__name__.replace('_', '-')}: loading ...", err=True, dim=True)
        from vtprune import VtpruneError

        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "vtprune":
                raise  # a part of this package is missing, which is a bug
            raise _exit(_install([(error.name or str(error)).split(".")[0]])) from error
        except (VtpruneError, ImportError, ValueError, TypeError, OSError) as error:
            raise _exit(" ".join(str(error).split())) from error

    return run  # type: ignore[return-value]


def _exit(message: str) -> typer.Exit:
    typer.secho(f"vtprune: {message}", err=True, fg="red")
    return typer.Exit(2)


# Where the name of a package is not that of its module.
_PACKAGES = {
    "PIL": "pillow", "easy_vqa": "easy-vqa", "open_clip": "open-clip-torch", "prometheus_client": "prometheus-client",
    "skvideo": "scikit-video",
}  # fmt: skip


def needs(*modules: str) -> None:
    """Refuse before any work if a package that this command will want is missing."""
    missing = [name for name in modules if not _installed(name)]
    if missing:
        raise ValueError(_install(missing))


def _installed(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def _install(modules: list[str]) -> str:
    names = [_PACKAGES.get(name, name) for name in modules]
    verb = "is" if len(names) == 1 else "are"
    return f"this command needs {' and '.join(names)}, which {verb} not installed: run pip install {' '.join(names)}"


def seen(image: Path | None, video: Path | None, frames: int) -> Any:
    """The user's picture, or a `Video` of so many frames of the user's film; None where neither is named."""
    if image is not None and video is not None:
        raise ValueError("--image and --video: name one of them")
    if image is not None:
        from vtprune import pictures

        return pictures.read(image)[0]
    if video is not None:
        from vtprune.evals.video import read

        return read(video, frames)
    return None


def writable(out: Path) -> None:
    """Say before the work, not after it, that a picture cannot be written there."""
    from PIL import Image

    kinds = Image.registered_extensions()
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file in it, such as {out / 'kept.png'}")
    if kinds.get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {out}: Pillow writes no {out.suffix or 'file without an ending'}; use .png")
    folder(out.parent)


def folder(path: Path) -> None:
    """Make a folder to write to; one sentence if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: no folder {path} can be made ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"--out: the folder {path} may not be written to")


def print_json(kind: str, body: dict[str, Any]) -> None:
    """What --json prints: one object behind its schema and version, as a saved report has them."""
    import json

    from vtprune.evals.report import as_document

    typer.echo(json.dumps(as_document(kind, body), indent=1, allow_nan=False))


def show_report(report: Report, as_json: bool) -> None:
    if as_json:
        typer.echo(report.to_json())
        return
    from vtprune.evals.report import one_line

    console = terminal()
    for table in report.tables():
        console.print(table)
    console.print(one_line(report.environment), style="dim", markup=False)


def terminal() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=180)
