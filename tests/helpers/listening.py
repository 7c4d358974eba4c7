"""Shared by the tests of inference: records of the package handed to a function, which may end the work."""

import logging
from contextlib import contextmanager

LOGGER = "probattn.inference"


class _Receiver(logging.Handler):
    def __init__(self, receive):
        super().__init__(logging.INFO)
        self.emit = receive


@contextmanager
def listening(receive, name=LOGGER):
    """Hand every record at level INFO or above, below a logger, to a function while the block runs."""
    logger = logging.getLogger(name)
    handler, level = _Receiver(receive), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
