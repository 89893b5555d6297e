"""Ctrl-C while there is nothing to keep. Imports nothing that takes time."""

import os

INTERRUPTED = 130  # 128 + SIGINT


def end_at_once(*_):
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
