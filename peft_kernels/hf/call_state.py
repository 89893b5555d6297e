"""A value that the hooks of one forward pass to each other."""

import threading


class CallState:
    """One value per thread, initially None, so that concurrent forwards of one model do not interfere.

    Copies and pickles start with None, because no forward is running in them. The value lives in a plain
    ``threading.local``, which ``torch.compile`` traces; a context variable breaks its graph, and a subclass of
    ``threading.local`` is traced with stale values.
    """

    def __init__(self):
        self._local = threading.local()

    def get(self):
        return getattr(self._local, "value", None)

    def set(self, value) -> None:
        self._local.value = value

    def __reduce__(self):
        return CallState, ()
