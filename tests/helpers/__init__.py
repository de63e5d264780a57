"""What several test modules share; the commonest of it is importable from here."""

from .images import PHOTOS, four_photos, normalized, real_image, smooth_noise
from .models import LOADING, assert_exact, enliven, timm_vits_trace
from .scripts import ROOT, SCRIPTS, command, load_script, script_status

__all__ = [
    "LOADING",
    "PHOTOS",
    "ROOT",
    "SCRIPTS",
    "assert_exact",
    "command",
    "enliven",
    "four_photos",
    "load_script",
    "normalized",
    "real_image",
    "script_status",
    "smooth_noise",
    "timm_vits_trace",
]
