"""A value that the hooks of one forward hand to each other."""

import threading


class CallState:
    """One value for each thread, None at first: forwards of one model in several threads do not meet.

    Copies and pickles begin with None, because no forward is under way in them. The value lies in a plain ``threading.local``, which
    ``torch.compile`` traces; a context variable breaks its graph, and from a subclass of ``threading.local`` it reads stale values.
    """

    def __init__(self):
        self._local = threading.local()

    def get(self):
        return getattr(self._local, "value", None)

    def set(self, value) -> None:
        self._local.value = value

    def __reduce__(self):
        return CallState, ()
