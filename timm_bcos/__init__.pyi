from .attribution.registry import attribute
from .conversion.config import BcosConfig
from .conversion.converted import bcosify
from .conversion.fusing import fuse
from .conversion.rules import RULES, Place, keep, keep_whole, pass_sigmoid
from .dynamic_linear.bias_tracker import Defect
from .dynamic_linear.mode import constant, declare, explanation_mode, on_linear_path
from .errors import (
    BcosError,
    CheckpointError,
    InexactWarning,
    InputError,
    MethodError,
    ModelStateError,
    NotFineTunedWarning,
    PublishError,
    TargetError,
    UnsupportedModuleError,
)
from .explanation.api import contrast, explain, explain_targets
from .explanation.exactness import Check, check, settle
from .explanation.export import export_explainer
from .explanation.result import Explanation
from .hub.card import Card, Evaluation
from .hub.repository import publish, save_repository
from .hub.space import publish_space, save_space
from .models.shift_averaged import ShiftAveraged
from .models.zero_shot import ZeroShotClassifier, embed_texts
from .nn.functional import encode_image
from .nn.layers import BcosConv2d, BcosLinear
from .nn.norms import UncentredBatchNorm2d
from .training.losses import DynamicWeights, cosine_loss, dynamic_weights, energy_loss
from .training.tasks import DeletionClassificationTask, ExplanationDistillationTask, GuidedClassificationTask

__version__: str

__all__ = [
    "RULES",
    "BcosConfig",
    "BcosConv2d",
    "BcosError",
    "BcosLinear",
    "Card",
    "Check",
    "CheckpointError",
    "Defect",
    "DeletionClassificationTask",
    "DynamicWeights",
    "Evaluation",
    "Explanation",
    "ExplanationDistillationTask",
    "GuidedClassificationTask",
    "InexactWarning",
    "InputError",
    "MethodError",
    "ModelStateError",
    "NotFineTunedWarning",
    "Place",
    "PublishError",
    "ShiftAveraged",
    "TargetError",
    "UncentredBatchNorm2d",
    "UnsupportedModuleError",
    "ZeroShotClassifier",
    "attribute",
    "bcosify",
    "check",
    "constant",
    "contrast",
    "cosine_loss",
    "declare",
    "dynamic_weights",
    "embed_texts",
    "encode_image",
    "energy_loss",
    "explain",
    "explain_targets",
    "explanation_mode",
    "export_explainer",
    "fuse",
    "keep",
    "keep_whole",
    "on_linear_path",
    "pass_sigmoid",
    "publish",
    "publish_space",
    "save_repository",
    "save_space",
    "settle",
]
