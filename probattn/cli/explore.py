"""``probattn explore``: the theory as a page to play with."""

from __future__ import annotations

import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from probattn.cli.command import command
from probattn.cli.output import say
from probattn.errors import InputError
from probattn.models.options import Range, check_options

__all__ = ["OPTIONS", "ExploreOptions", "app", "run"]


@dataclass(frozen=True)
class ExploreOptions:
    """Options of ``probattn explore``.

    Attributes:
        save: file that the page is written to, instead of being served.
        port: port on this machine; if taken, the next free one; 0 takes any.
        browser: open the page in the browser.
    """

    save: Path | None = None
    port: Annotated[int, Range(least=0, most=65535)] = 8327
    browser: bool = True

    def __post_init__(self) -> None:
        check_options(self)


def run(options: ExploreOptions) -> None:
    """Explore folds, margins, masses and the infinite sequence in the browser, by dragging tokens.

    The page is one file and asks no network for anything. Exit status: 0 done, 2 bad usage or input.
    """
    from probattn.teach.explorer import explorer_page, serve_page

    page = explorer_page()
    if options.save is not None:
        _write(options.save, page)
        size = len(page.encode()) / 1024
        say(f"explorer: {options.save} ({size:.0f} KiB); open it in a browser, or host it anywhere.")
        return
    server = serve_page(page, options.port)
    with server:
        if options.port not in (0, server.server_port):
            say(f"port {options.port} is taken; using {server.server_port}.")
        address = f"http://127.0.0.1:{server.server_port}/"
        say(f"explorer: {address} (Ctrl-C stops it)")
        if options.browser:
            # Beside the server: a browser in the terminal would wait for an answer while nobody serves.
            threading.Thread(target=_open, args=(address,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped.")


def _write(path: Path, page: str) -> None:
    """Write the file whole, or say why not."""
    from probattn.inference.runtime.files import write_text

    if path.is_dir():
        raise InputError(f"--save {path}: a folder; name a file in it, such as {path / 'explorer.html'}.")
    try:
        write_text(path, page)
    except InputError as error:
        raise InputError(f"--save {error}") from None


def _open(address: str) -> None:
    try:
        found = webbrowser.open(address)
    except webbrowser.Error:
        found = False
    if not found:
        say("no browser was found; open the address above in one.")


OPTIONS = ExploreOptions
app = command("explore", OPTIONS, run)
