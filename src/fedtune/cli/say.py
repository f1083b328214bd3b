"""Lines on the terminal, whatever is in them: names of files, columns, tensors and teams come from outside."""

from __future__ import annotations

import logging

import typer

from fedtune.types import plain


def say(text: str, *, err: bool = False) -> None:
    """Print one line; whatever would end it or steer a terminal is escaped."""
    typer.echo(plain(text).replace("\n", "\\n").replace("\t", "\\t"), err=err)


class PlainFormatter(logging.Formatter):
    """Log lines without anything that steers a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message, made plain."""
        return plain(super().format(record))
