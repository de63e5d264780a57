"""Places where a model is not dynamic linear, in words."""

from dataclasses import dataclass

__all__ = ["Violation"]

TEXTS = {
    "added": "{} adds a value that depends on the image but is not on its linear path (a gate or a statistic)",
    "unknown": "{} is not known to be linear; say what it is with timm_bcos.register_function",
    "unseen": "reads what {} makes, a program that explanation mode does not see into",
    "changes": "{} adds what looks like a constant, but is different for another image",
    "calls": "{} is called for some images only, and adds a constant: the model chooses its constants by the image",
    "reads": "changes the image before its first layer reads it, in a way that depends on the image ({})",
    "images": "its output for an image depends on the other images of the batch ({})",
    "incomplete": "contributions and constants do not add up to the output ({})",
    "shifted": "its output differs from the one outside of explanation mode ({})",
    "random": "its output differs from one run to the next ({})",
    "dead": "its output is 0 for every image: there is nothing to explain ({})",
}


@dataclass(frozen=True)
class Violation:
    """A place where a model is not dynamic linear.

    Attributes:
        module: Path of the module whose forward calls the function, '' for the root.
        function: Name of the torch function, or a figure that shows the violation.
        kind: A key of `TEXTS`: 'added' for an image-dependent value that is added, 'unknown' for a function that is not
            declared, 'unseen' for a program of which torch shows the result alone, read in `module`, and so on.
    """

    module: str
    function: str
    kind: str

    def __str__(self) -> str:
        where = self.module or "the model itself"
        return f"{where}: {TEXTS[self.kind].format(self.function)}"
