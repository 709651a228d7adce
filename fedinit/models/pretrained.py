"""torchvision's checkpoints, from torch hub's folder or the network."""

from pathlib import Path
from urllib.error import URLError

import torch
from torchvision.models import WeightsEnum

from fedinit.errors import RequestError


def torchvision_checkpoint(weights: WeightsEnum) -> Path:
    """Return the file of torchvision's weights, downloaded once if the network allows.

    Raises:
        RequestError: it is not there and cannot be had; the text says where to put it.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        hash_prefix = path.stem.rpartition("-")[2]
        try:
            torch.hub.download_url_to_file(weights.url, str(path), hash_prefix)
        except (URLError, OSError, RuntimeError) as error:
            raise RequestError(
                f"initialization: cannot download {weights.url} ({error}); put that file at {path}"
            ) from None
    return path
