"""How long a request may take to arrive at the web page's server."""

import functools
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

PATIENCE = 15.0  # seconds without a byte, after which a connection is closed
CROWDED_PATIENCE = 2.0  # the same while new connections have to wait for a free one
MIN_RATE = 5_000  # bytes per second at which a request must arrive, after that time
MAX_SECONDS = 300.0  # in which it must have arrived


def limit_requests(server: Any) -> None:
    """Let a server of waitress close the connections whose request is late."""
    # A server of several addresses has a server for each of them.
    for each in list(getattr(server, "map", {0: server}).values()):
        if hasattr(each, "maintenance"):
            each.maintenance = functools.partial(close_late, each, WeakKeyDictionary())


def close_late(server: Any, began: MutableMapping[Any, float], now: float) -> None:
    """Close the connections of a server whose request is late; waitress calls it every second.

    `began` has the requests that are arriving, and when they were first seen.
    """
    patience = CROWDED_PATIENCE if server.in_connection_overflow else PATIENCE
    for connection in server.active_channels.values():
        request = connection.request
        age = 0.0 if request is None else now - began.setdefault(request, now)
        if is_late(connection, now, age, patience):
            connection.will_close = True


def is_late(connection: Any, now: float, age: float, patience: float) -> bool:
    """Return whether a connection is silent, or its request of `age` seconds arrives too slowly."""
    if connection.requests:  # one is being answered
        return False
    if now - connection.last_activity > patience:
        return True
    if (request := connection.request) is None:
        return False
    received = request.header_bytes_received + request.body_bytes_received
    return age > MAX_SECONDS or received < MIN_RATE * (age - patience)
