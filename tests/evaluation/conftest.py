"""A small converted model for the tests of evaluations."""

import pytest
import timm
from torch import nn

from timm_bcos import BcosConfig, bcosify


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return bcosify(timm.create_model("test_resnet", num_classes=5), BcosConfig.finetune(b=1.5)).eval()
