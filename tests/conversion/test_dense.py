"""torchvision's segmentation and detection models: what in the image makes a region, or a box, say so."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection, resnet18, segmentation, vgg
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import retinanet, ssd
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tests.helpers import real_image
from tests.helpers.slow import slow_but_for
from timm_bcos import BcosConfig, bcosify, calibrate, check, contrast, explain
from timm_bcos.nn.heads import BcosConvClassifier

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SMALL = dict(weights=None, weights_backbone=None, num_classes=5)
SIZE = 96


class BoxScores(nn.Module):
    """A detector's class scores (N, boxes, K) and box offsets, without what prepares images and selects boxes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.head(list(self.backbone(x).values()))
        return found


class Cut(nn.Module):
    """A narrow detector's parts, as torchvision names them."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head


def cut_resnet() -> nn.Module:
    """Two stages of a ResNet-18, of 64 and 128 channels, whose maps are as large as those of fcn_resnet50."""
    return IntermediateLayerGetter(resnet18(), {"layer1": "aux", "layer2": "out"})


def cut_retinanet(num_classes: int, **_: object) -> nn.Module:
    layers = {"layer1": "0", "layer2": "1", "layer3": "2"}
    backbone = BackboneWithFPN(resnet18(), layers, [64, 128, 256], 32, LastLevelP6P7(32, 32))
    return Cut(backbone, retinanet.RetinaNetHead(32, 9, num_classes))


def cut_ssd(num_classes: int, **_: object) -> nn.Module:
    """With as many channels as ssd300_vgg16 where its extra layers need them."""
    stages = vgg.make_layers([8, "M", 8, "M", 8, "M", 512, "M", 16, 512, "M"])
    channels, anchors = [512, 1024, 512, 256, 256, 256], [4, 6, 6, 6, 4, 4]
    return Cut(ssd.SSDFeatureExtractorVGG(stages, highres=False), ssd.SSDHead(channels, anchors, num_classes))


SEGMENTERS: dict[str, Callable[..., nn.Module]] = {
    "fcn, cut": lambda num_classes, **_: segmentation.FCN(
        cut_resnet(), FCNHead(128, num_classes), FCNHead(64, num_classes)
    ),
    "deeplabv3, cut": lambda num_classes, **_: segmentation.DeepLabV3(
        cut_resnet(), DeepLabHead(128, num_classes), FCNHead(64, num_classes)
    ),
    "fcn_resnet50": partial(segmentation.fcn_resnet50, aux_loss=True),
    "deeplabv3_resnet50": partial(segmentation.deeplabv3_resnet50, aux_loss=True),
    "lraspp_mobilenet_v3_large": segmentation.lraspp_mobilenet_v3_large,
}
DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "retinanet, cut": cut_retinanet,
    "ssd, cut": cut_ssd,
    "retinanet_resnet50_fpn": detection.retinanet_resnet50_fpn,
    "ssd300_vgg16": detection.ssd300_vgg16,
    "ssdlite320_mobilenet_v3_large": detection.ssdlite320_mobilenet_v3_large,
}


SMALL_SEGMENTERS = ("fcn, cut", "deeplabv3, cut", "lraspp_mobilenet_v3_large")
SMALL_DETECTORS = ("retinanet, cut", "ssd, cut", "ssdlite320_mobilenet_v3_large")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return real_image(SIZE, 1).double()  # float32 gives these logits to about 1e-4 only


def converted(plain: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim == 1:
                parameter += 0.05 * torch.randn_like(parameter)
    return calibrate(bcosify(plain.double(), BcosConfig.finetune(b=1.5, bias=True, **IMAGENET)), x)


@pytest.mark.parametrize("name", slow_but_for(SMALL_SEGMENTERS, SEGMENTERS))
def test_segmentation(name: str, x: Tensor) -> None:
    model = converted(SEGMENTERS[name](**SMALL), x)
    outputs = model(x)
    assert all(maps.shape == (1, 5, SIZE, SIZE) for maps in outputs.values())
    for output in outputs:
        verdict = check(model, x, output=output)
        assert verdict.exact, verdict
    if name != "lraspp_mobilenet_v3_large":  # whose two classifiers are added up
        assert isinstance(model.classifier[-1], BcosConvClassifier)
        assert isinstance(model.aux_classifier[-1], BcosConvClassifier)
    box = (16, 24, 64, 80)
    found = explain(model, x, 2, region=box)
    torch.testing.assert_close(found.logit, outputs["out"][:, 2, 24:80, 16:64].mean((1, 2)))
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[24:80, 16:64] = True
    torch.testing.assert_close(explain(model, x, 2, region=mask).weights, found.weights)
    assert found.completeness_error.max() <= 1e-10
    assert contrast(model, x, 2, 4, region=box).completeness_error.max() <= 1e-10


@pytest.mark.parametrize(
    "name", slow_but_for(["retinanet, cut", "ssd, cut", "ssdlite320_mobilenet_v3_large"], DETECTORS)
)
def test_a_class_score_of_a_box(name: str, x: Tensor) -> None:
    x = (
        real_image(300, 1).double() if name in ("ssd, cut", "ssd300_vgg16") else x
    )  # its last maps need that many pixels
    model = converted(BoxScores(DETECTORS[name](**SMALL)), x)
    verdict = check(model, x, output="cls_logits")
    assert verdict.exact, verdict
    scores = model(x)["cls_logits"]
    strongest = explain(model, x, 3, output="cls_logits")
    torch.testing.assert_close(strongest.logit, scores[:, :, 3].amax(1))
    found = explain(model, x, 3, output="cls_logits", position=7)
    torch.testing.assert_close(found.logit, scores[:, 7, 3])
    offset = explain(model, x, 0, output="bbox_regression", position=7)
    torch.testing.assert_close(offset.logit, model(x)["bbox_regression"][:, 7, 0])
    assert max(e.completeness_error.max() for e in (strongest, found, offset)) <= 1e-10
