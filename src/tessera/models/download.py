"""A model of the Hugging Face hub, downloaded or from its cache; without a network that is said within seconds."""

from pathlib import Path

from tessera.core.errors import UserError
from tessera.core.network import reachable
from tessera.models.beside import TEMPLATES, TOKENIZER_FILES
from tessera.models.public import nearest_names, public_model


def download(name: str, weights: bool) -> Path:
    """The folder of model `name` of the hub, in the library's cache; downloaded where the cache lacks it.

    UserError: the hub has no such model, or cannot be reached and the cache has no copy; or the name is one that only
    the table of public models has.
    """
    public = public_model(name)
    if public and name.lower() not in [hub.lower() for hub in public.hub]:
        reason = f"means the sizes of {public.name}; where files are needed it takes a folder or a name of the hub"
        raise UserError("base_model", name, reason, public.hub[0] if public.hub else "a folder with config.json")
    import huggingface_hub  # most runs name a folder and need none of it
    from huggingface_hub import constants  # the package alone does not have it

    told, endpoint = constants.HF_HUB_OFFLINE, constants.ENDPOINT
    offline = told or not reachable(endpoint)
    patterns = ["*.json", *TOKENIZER_FILES, f"{TEMPLATES}/*", *(["model*.safetensors"] if weights else [])]
    try:
        constants.HF_HUB_OFFLINE = offline  # then it looks into its cache alone
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the library and the network below it raise many kinds
        said = str(error).partition(chr(10))[0]
        if offline:
            said = ("HF_HUB_OFFLINE is set" if told else f"{endpoint} cannot be reached") + ", its cache has no copy"
        reason = f"no such folder, and the hub gives no model of this name: {said}"
        hint = f"check the name, the network, or give a local folder; sizes are known of {nearest_names(name)}, …"
        raise UserError("base_model", name, reason, hint) from error
    finally:
        constants.HF_HUB_OFFLINE = told
