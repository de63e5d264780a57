"""`torch.hub.load("OWNER/timm_bcos", "bcos_densenet121", pretrained=...)`: every registered model.

`torch.hub.list("OWNER/timm_bcos")` names them; keyword arguments are those of `timm.create_model`.
"""

from timm_bcos.models.bcos_models import ENTRY_POINTS as _ENTRY_POINTS

dependencies = [
    "timm", "torch", "torchvision", "huggingface_hub", "lazy_loader", "safetensors", "matplotlib", "numpy", "PIL",
    "tqdm", "typer", "typing_extensions", "wrapt",
]  # fmt: skip

globals().update(_ENTRY_POINTS)
