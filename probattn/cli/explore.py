"""``probattn explore``: the theory as a page to play with."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from probattn.errors import InputError

__all__ = ["explore"]


def explore(
    save: Annotated[Path | None, typer.Option(help="Write the page to this file and stop; it needs no server.")] = None,
    port: Annotated[
        int, typer.Option(help="Port on this machine; if taken, the next free one; 0: any.", min=0, max=65535)
    ] = 8327,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Explore folds, margins, masses and the infinite sequence in the browser, by dragging tokens.

    The page is one file and asks no network for anything. Exit status: 0 done, 2 bad usage or input.
    """
    from probattn.teach.explorer import explorer_page, serve_page

    page = explorer_page()
    if save is not None:
        _write(save, page)
        typer.echo(
            f"explorer: {save} ({len(page.encode()) / 1024:.0f} KiB); open it in a browser, or host it anywhere."
        )
        return
    server = serve_page(page, port)
    with server:
        if port not in (0, server.server_port):
            typer.echo(f"port {port} is taken; using {server.server_port}.")
        address = f"http://127.0.0.1:{server.server_port}/"
        typer.echo(f"explorer: {address} (Ctrl-C stops it)")
        if browser:
            # Beside the server: a browser in the terminal would wait for an answer while nobody serves.
            threading.Thread(target=_open, args=(address,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("stopped.")


def _write(path: Path, page: str) -> None:
    """The file whole, or the reason why not."""
    from probattn.inference.runtime.files import write_text

    if path.is_dir():
        raise InputError(f"--save {path}: a folder; name a file in it, such as {path / 'explorer.html'}.")
    try:
        write_text(path, page)
    except OSError as error:
        raise InputError(
            f"--save {path}: cannot be written ({error.strerror}); name a file in a folder that can."
        ) from None


def _open(address: str) -> None:
    try:
        found = webbrowser.open(address)
    except webbrowser.Error:
        found = False
    if not found:
        typer.echo("no browser was found; open the address above in one.")
