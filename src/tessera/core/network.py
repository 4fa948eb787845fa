"""Whether a server can be reached, told within seconds: libraries that download try for half a minute."""

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 4.0
"""Seconds that a server has to take a connection."""


def reachable(endpoint: str) -> bool:
    """Whether the server of a URL, or the proxy before it, takes a connection within `PATIENCE` seconds."""
    url = urlsplit(endpoint)
    proxy = getproxies().get(url.scheme)
    if proxy:
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    found: list[bool] = []

    def connect() -> None:
        try:
            port = url.port or (80 if url.scheme == "http" else 443)
            socket.create_connection((url.hostname, port), PATIENCE).close()
            found.append(True)
        except (OSError, ValueError):
            pass

    # in a thread, for looking up a name takes no limit
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(found)
