from .attribution.registry import attribute
from .conversion.config import BcosConfig
from .conversion.converted import bcosify
from .conversion.fusing import fuse
from .conversion.rules import RULES, LayerRole, keep, keep_leaf, sigmoid_as_activation
from .dynamic_linear.bias_tracker import Violation
from .dynamic_linear.mode import explanation_mode, mark_constant, on_linear_path, register_function
from .errors import (
    BcosError,
    CheckpointError,
    InexactWarning,
    InputError,
    MethodError,
    MissingExtraError,
    ModelStateError,
    NotFineTunedWarning,
    PublishError,
    TargetError,
    UnsupportedModuleError,
)
from .explainer import Explainer
from .explanation.api import contrast, explain, explain_targets
from .explanation.exactness import ExactnessReport, calibrate, check
from .explanation.export import export_explainer
from .explanation.patches import fold_patches
from .explanation.result import Explanation
from .hub.card import Card, Evaluation
from .hub.repository import publish, save_repository
from .hub.space import publish_space, save_space
from .models.shift_averaged import ShiftAveraged
from .models.zero_shot import ZeroShotClassifier, embed_texts
from .nn.functional import encode_image
from .nn.layers import BcosConv2d, BcosLinear
from .nn.norms import UncenteredBatchNorm2d, UncentredBatchNorm2d
from .training.losses import DynamicWeights, cosine_loss, dynamic_weights, energy_loss
from .training.probe import fit_probe
from .training.probe_result import ProbeResult
from .training.tasks import DeletionClassificationTask, ExplanationDistillationTask, GuidedClassificationTask

__version__: str

__all__ = [
    "RULES",
    "BcosConfig",
    "BcosConv2d",
    "BcosError",
    "BcosLinear",
    "Card",
    "CheckpointError",
    "DeletionClassificationTask",
    "DynamicWeights",
    "Evaluation",
    "ExactnessReport",
    "Explainer",
    "Explanation",
    "ExplanationDistillationTask",
    "GuidedClassificationTask",
    "InexactWarning",
    "InputError",
    "LayerRole",
    "MethodError",
    "MissingExtraError",
    "ModelStateError",
    "NotFineTunedWarning",
    "ProbeResult",
    "PublishError",
    "ShiftAveraged",
    "TargetError",
    "UncenteredBatchNorm2d",
    "UncentredBatchNorm2d",
    "UnsupportedModuleError",
    "Violation",
    "ZeroShotClassifier",
    "attribute",
    "bcosify",
    "calibrate",
    "check",
    "contrast",
    "cosine_loss",
    "dynamic_weights",
    "embed_texts",
    "encode_image",
    "energy_loss",
    "explain",
    "explain_targets",
    "explanation_mode",
    "export_explainer",
    "fit_probe",
    "fold_patches",
    "fuse",
    "keep",
    "keep_leaf",
    "mark_constant",
    "on_linear_path",
    "publish",
    "publish_space",
    "register_function",
    "save_repository",
    "save_space",
    "sigmoid_as_activation",
]
