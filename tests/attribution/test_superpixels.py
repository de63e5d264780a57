"""LIME's local model against slower, plainer ways to the same numbers."""

import pytest
import torch
from torch import Tensor

from tests.helpers import real_image

pytest.importorskip("skimage")
pytest.importorskip("captum")

from captum._utils.models.model import Model
from captum.attr import Lime
from skimage.segmentation import quickshift

from timm_bcos.attribution.lime import local_weights, mean_colors, quickshift_segments


@pytest.fixture
def masks() -> Tensor:
    masks = torch.randint(2, (300, 9))
    masks[0] = 1
    return masks


def closeness(mask: Tensor) -> float:
    """An exponential kernel of width 0.25 on the cosine distance to a vector of ones."""
    distance = 1 - torch.cosine_similarity(mask.double(), torch.ones(len(mask)).double(), dim=0)
    return torch.exp(-(distance**2) / 0.25**2).sqrt().item()


def fit(columns: Tensor, values: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Weighted ridge regression with an intercept: slopes, and what it explains of the variance."""
    design = torch.cat([columns.double(), torch.ones(len(columns), 1).double()], 1)
    penalty = ridge * torch.eye(design.shape[1]).double()
    penalty[-1, -1] = 0
    found = torch.linalg.solve(design.T @ (weights[:, None] * design) + penalty, design.T @ (weights * values))
    mean = (weights * values).sum() / weights.sum()
    unexplained = (weights * (values - design @ found) ** 2).sum() / (weights * (values - mean) ** 2).sum()
    return found[:-1], 1 - unexplained.item()


def test_local_weights_literally(masks: Tensor) -> None:
    """Forward selection by the explained variance of every candidate, then a ridge regression on the chosen ones."""
    answers = (masks.double() @ torch.randn(9, 2).double() + torch.randn(300, 2)).sigmoid()
    weights = torch.tensor([closeness(mask) for mask in masks], dtype=torch.double)
    found = local_weights(masks, answers, 4)
    for k in range(2):
        chosen: list[int] = []
        for _ in range(4):
            scores = {f: fit(masks[:, [*chosen, f]], answers[:, k], weights, 0)[1] for f in range(9) if f not in chosen}
            chosen.append(max(scores, key=lambda f: scores[f]))
        expected = torch.zeros(9).double()
        expected[chosen] = fit(masks[:, chosen], answers[:, k], weights, 1)[0]
        torch.testing.assert_close(found[k], expected)


def test_fewer_segments_than_features_and_segments_that_never_change(masks: Tensor) -> None:
    masks[:, 3] = 1
    found = local_weights(masks, masks.double() @ torch.arange(9.0).double()[:, None], 20)
    assert found[0, 3] == 0
    assert (found[0].diff()[[0, 1, 4, 5, 6, 7]] > 0).all()
    assert not local_weights(masks[:1], torch.rand(1, 2), 5).any()  # the image itself, and nothing to compare it with


class Ridge(Model):
    """As captum wants a local model."""

    def fit(self, train_data, **_):
        (columns, values, weights), *_ = list(train_data)
        self.slopes = fit(columns, values.double(), weights.double(), 1)[0].float()

    def representation(self):
        return self.slopes

    def __call__(self, x):
        raise NotImplementedError


def test_all_segments_are_captums_lime(masks: Tensor) -> None:
    image = real_image(24)
    segments = torch.arange(24 * 24).reshape(24, 24) // 64
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 5), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1600, 2)
    )
    background = mean_colors(image[0], segments)
    rows = iter(masks[:, None])
    lime = Lime(network, Ridge(), lambda x, changed, mask, **_: closeness(mask[0]), lambda x, **_: next(rows))
    expected = lime.attribute(image, background[None], 1, feature_mask=segments[None, None], n_samples=300,
                              return_input_shape=False)  # fmt: skip
    with torch.no_grad():
        shown = masks[:, segments].bool()[:, None]
        answers = network(torch.where(shown, image, background))
    torch.testing.assert_close(local_weights(masks, answers, 9)[1].float(), expected.flatten(), rtol=1e-3, atol=1e-5)


def test_segments_and_their_colors() -> None:
    image = real_image(48)[0]
    pixels = image.permute(1, 2, 0).double().numpy()
    segments = quickshift_segments(image, 2)
    assert (segments.numpy() == quickshift(pixels, kernel_size=2, max_dist=200, ratio=0.2)).all()
    assert segments.unique().tolist() == list(range(int(segments.max()) + 1)) and segments.max() > 1
    found = mean_colors(image, segments)
    for number in segments.unique():
        place = segments == number
        torch.testing.assert_close(found[:, place], image[:, place].mean(1, keepdim=True).expand(-1, int(place.sum())))
    gray = image[:1]
    assert torch.equal(quickshift_segments(gray, 2), quickshift_segments(gray.expand(3, -1, -1), 2))
