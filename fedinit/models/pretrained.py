"""Published weights: from torch hub's folder, the Hugging Face cache, or the network."""

import os
from pathlib import Path
from urllib.error import URLError

import torch

from fedinit.errors import NotHereError, named


def torchvision_checkpoint(name: str) -> Path:
    """Return the file of torchvision's weights of a name, downloaded once if the network allows.

    Raises:
        NotHereError: it is not there and cannot be had; the text says where to put it.
    """
    from torchvision.models import get_weight

    weights = get_weight(name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not path.exists():
        hash_prefix = path.stem.rpartition("-")[2]
        try:
            if os.environ.get("HF_HUB_OFFLINE", "0") != "0":  # the hub's name for what is asked
                raise OSError("offline")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(path), hash_prefix)
        except (URLError, OSError, RuntimeError) as error:
            raise NotHereError(
                f"initialization: cannot download {weights.url} ({error}); put that file at {path}"
            ) from None
    return path


def hub_weights(repository: str) -> Path:
    """Return the model.safetensors of a repository on the Hugging Face hub, downloaded once.

    Raises:
        NotHereError: it is not in the cache and cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # the network, the hub, the cache
        raise NotHereError(
            f"initialization: cannot fetch {repository} from the Hugging Face hub ({named(error)});"
            " name its model.safetensors as the initialization instead"
        ) from None
