"""Ctrl-C while there are no results to keep. Imports only fast modules."""

import os

INTERRUPTED = 130  # 128 + SIGINT


def end_at_once(*_):
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
