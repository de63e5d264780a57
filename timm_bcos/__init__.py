"""B-cos networks for timm: inherently interpretable networks whose explanations are exact.

Importing this package registers its networks with timm:

    >>> import timm, timm_bcos
    >>> model = timm.create_model("bcos_densenet121").eval()
    >>> explanation = timm_bcos.explain(model, images)  # images (N, 3, H, W) in [0, 1]
    >>> explanation.plot()
"""

__version__ = "0.1.0"

# some register as they are imported
from . import attribution_methods, bcos_models, dynamic_table, model, recurrent, render  # noqa: F401
from .attribution import attribute
from .check import Check, check, settle
from .config import BcosConfig
from .convert import bcosify
from .dynamic import constant, declare, explanation_mode, on_linear_path
from .errors import (
    BcosError,
    CheckpointError,
    InputError,
    MethodError,
    ModelStateError,
    PublishError,
    TargetError,
    UnsupportedModuleError,
)
from .explain import Explanation, explain, explain_targets
from .export import export_explainer
from .functional import encode_image
from .layers import BcosConv2d, BcosLinear
from .model_card import Card, Evaluation
from .norms import UncentredBatchNorm2d
from .publish import publish, save_repository
from .rules import RULES, Place, keep, keep_whole

__all__ = [
    "RULES",
    "BcosConfig",
    "BcosConv2d",
    "BcosError",
    "BcosLinear",
    "Card",
    "Check",
    "CheckpointError",
    "Evaluation",
    "Explanation",
    "InputError",
    "MethodError",
    "ModelStateError",
    "Place",
    "PublishError",
    "TargetError",
    "UncentredBatchNorm2d",
    "UnsupportedModuleError",
    "attribute",
    "bcosify",
    "check",
    "constant",
    "declare",
    "encode_image",
    "explain",
    "explain_targets",
    "explanation_mode",
    "export_explainer",
    "keep",
    "keep_whole",
    "on_linear_path",
    "publish",
    "save_repository",
    "settle",
]
