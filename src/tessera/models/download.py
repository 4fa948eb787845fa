"""A model of the Hugging Face hub, downloaded or from its cache; without a network that is said within seconds."""

import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from tessera.core.errors import UserError
from tessera.models.beside import TEMPLATES, TOKENIZER_FILES

PATIENCE = 4.0
"""Seconds that the hub has to take a connection; the library tries again and again, for half a minute."""


def download(name: str, weights: bool) -> Path:
    """The folder of model `name` of the hub, in the library's cache; downloaded where the cache lacks it.

    UserError: the hub has no such model, or cannot be reached and the cache has no copy.
    """
    import huggingface_hub  # most runs name a folder and need none of it
    from huggingface_hub import constants  # the package alone does not have it

    told, endpoint = constants.HF_HUB_OFFLINE, constants.ENDPOINT
    offline = told or not _reachable(endpoint)
    patterns = ["*.json", *TOKENIZER_FILES, f"{TEMPLATES}/*", *(["model*.safetensors"] if weights else [])]
    try:
        constants.HF_HUB_OFFLINE = offline  # then it looks into its cache alone
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the library and the network below it raise many kinds
        said = str(error).partition(chr(10))[0]
        if offline:
            said = ("HF_HUB_OFFLINE is set" if told else f"{endpoint} cannot be reached") + ", its cache has no copy"
        reason = f"no such folder, and the hub gives no model of this name: {said}"
        raise UserError("base_model", name, reason, "check the name, the network, or give a local folder") from error
    finally:
        constants.HF_HUB_OFFLINE = told


def _reachable(endpoint: str) -> bool:
    """Whether the hub, or the proxy before it, takes a connection within `PATIENCE` seconds."""
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
