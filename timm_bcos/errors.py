"""Every exception that timm_bcos raises on purpose: one family, each also the fitting built-in."""


class BcosError(Exception):
    """Base class: `except BcosError` catches whatever timm_bcos refuses."""


class InputError(BcosError, ValueError):
    """An image, tensor or file that cannot be used: wrong channels, range, shape or kind."""


class TargetError(BcosError, LookupError):
    """A class, layer, unit or position that the model does not have."""


class ModelStateError(BcosError, RuntimeError):
    """A model that cannot be explained as it is: in training mode, or without a B-cos stem."""


class UnsupportedModuleError(BcosError, TypeError):
    """Modules that no conversion rule covers.

    Attributes:
        problems: One line per module: its path, its type and what to do.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        listing = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"cannot convert {len(problems)} module(s); the model is unchanged:\n{listing}")


class NotFineTunedWarning(UserWarning):
    """A model that starts from pretrained weights, but will not compute what they were trained for."""


class CheckpointError(BcosError, RuntimeError):
    """A weight file that is missing, broken, unsafe or of another model."""


class PublishError(BcosError, RuntimeError):
    """The Hugging Face Hub cannot be reached, or refuses an upload."""


class MethodError(BcosError, ValueError):
    """An attribution method or metric that does not exist, lacks its library, or does not suit the architecture."""


class MissingExtraError(MethodError):
    """An attribution method whose library is not installed; the message names the extra."""


class DistributedError(BcosError, RuntimeError):
    """Processes that were started together cannot connect to each other, or one of them has ended."""


class MissingError(BcosError, ImportError):
    """A part of timm, torch or another library that is needed, and that the installed version does not have."""


class InexactWarning(UserWarning):
    """An explanation that is not exact, since explanation mode does not know a part of the model."""
