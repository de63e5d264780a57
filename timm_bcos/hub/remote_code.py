"""The file beside published weights that lets transformers load them with `trust_remote_code=True`.

transformers copies it out of the repository and executes it; nothing of this package imports it.
"""

from pathlib import Path

__all__ = ["AUTO_MAP", "MODULE", "write_module"]

MODULE = "bcos_timm.py"
AUTO_MAP = {
    "AutoConfig": "bcos_timm.BcosTimmConfig",
    "AutoImageProcessor": "bcos_timm.BcosTimmImageProcessor",
    "AutoModel": "bcos_timm.BcosTimmModel",
    "AutoModelForImageClassification": "bcos_timm.BcosTimmForImageClassification",
}
SOURCE = '''\
"""B-cos networks of timm in transformers: importing timm_bcos registers them. Needs `pip install timm_bcos`."""

import timm_bcos  # noqa: F401
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor


class BcosTimmConfig(TimmWrapperConfig):
    pass


class BcosTimmImageProcessor(TimmWrapperImageProcessor):
    pass


class BcosTimmModel(TimmWrapperModel):
    config_class = BcosTimmConfig


class BcosTimmForImageClassification(TimmWrapperForImageClassification):
    config_class = BcosTimmConfig
'''


def write_module(folder: Path) -> None:
    """Write it into a folder."""
    (folder / MODULE).write_text(SOURCE, encoding="utf-8")
