"""Learning the concepts of a layer from a data set: by NMF, clustering, or a sparse autoencoder."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..attribution.registry import AttributionModel, check_counts
from ..data.datasets import LabeledImages, map_batches
from ..distributed import on_main
from ..errors import InputError
from ..evaluation.neurons import layer_maps
from ..explanation.inputs import layer_path
from .dictionary import Concepts

__all__ = ["METHODS", "collect_features", "learn_concepts"]


def learn_concepts(
    model: nn.Module,
    dataset: LabeledImages,
    layer: str | nn.Module,
    count: int = 16,
    method: str = "nmf",
    *,
    vectors: int = 20_000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Concepts:
    """Learn concepts from feature vectors of a layer.

    Several processes share the images (`timm_bcos.distributed`); process 0 learns the concepts.

    Args:
        model: A B-cos model in eval mode.
        dataset: Data set from `timm.data.create_dataset`.
        layer: Layer whose output is a feature map or tokens, or its path.
        count: Number K of concepts; ignored by 'channels'.
        method: 'nmf' (non-negative factors of the features' positive and negative parts), 'kmeans' (cosine clusters),
            'sae' (a sparse autoencoder without biases, with K / 8 active concepts per vector), or 'channels' (each
            channel is a concept).
        vectors: Number of feature vectors to learn from, drawn at random.
        batch_size: Number of images per batch.
        seed: Random seed.
        progress: Show a progress bar.

    Raises:
        InputError: If the method is unknown, there are more concepts than vectors, or scikit-learn is not installed
            (extra `concepts`).
        TargetError: If the layer does not exist or has no positions.
    """
    check_counts(count=count, vectors=vectors, batch_size=batch_size)
    if method not in METHODS:
        raise InputError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    layer = layer_path(model, layer)
    features = collect_features(model, dataset, layer, vectors, batch_size=batch_size, seed=seed, progress=progress)
    if method != "channels" and count > len(features):
        raise InputError(f"{count} concepts from {len(features)} feature vectors: give more images, or fewer concepts")
    return on_main(partial(METHODS[method], layer, features, count, seed))


def collect_features(
    model: nn.Module,
    dataset: LabeledImages,
    layer: str,
    vectors: int,
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """At most `vectors` feature vectors (M, C) at random positions of random images.

    Positions depend on the seed and the image alone, so that processes can share the images.
    """
    if len(dataset) == 0:
        raise InputError("the data set has no images")
    generator, subject = torch.Generator().manual_seed(seed), AttributionModel(model)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    each = max(1, -(-vectors // len(order)))
    found: list[Tensor] = []

    def pick(indices: Sequence[int], images: Tensor, labels: Tensor) -> Tensor:
        picked = []
        for index, features in zip(indices, layer_maps(subject, layer, images), strict=True):
            positions = np.random.default_rng((seed % 2**64, index)).permutation(features.shape[1])[:each]
            picked.append(features[:, torch.from_numpy(positions).to(features.device)].T.cpu())
        return torch.cat(picked)

    for features in map_batches(pick, model, dataset, order, batch_size, layer if progress else None):
        found.append(features)
        if sum(map(len, found)) >= vectors:
            break
    return torch.cat(found)[:vectors]


def _nmf(layer: str, features: Tensor, count: int, seed: int) -> Concepts:
    """NMF of the concatenated positive and negative parts of signed features; a concept is their difference."""
    from sklearn.decomposition import NMF

    parts = torch.cat([features.clamp_min(0), (-features).clamp_min(0)], 1)
    factors = NMF(count, init="nndsvda", random_state=seed, max_iter=400, tol=1e-3).fit(parts.double().numpy())
    positive, negative = torch.from_numpy(factors.components_).to(features).chunk(2, dim=1)
    directions = positive - negative
    return Concepts.from_matrix(layer, F.normalize(directions[directions.norm(dim=1) > 0], dim=1), "nmf")


def _kmeans(layer: str, features: Tensor, count: int, seed: int) -> Concepts:
    from sklearn.cluster import MiniBatchKMeans

    unit = F.normalize(features[features.norm(dim=1) > 0], dim=1)
    clusters = MiniBatchKMeans(min(count, len(unit)), random_state=seed, n_init=3).fit(unit.double().numpy())
    centers = F.normalize(torch.from_numpy(clusters.cluster_centers_).to(features), dim=1)
    return Concepts(layer, centers, centers.clone(), "nearest", method="kmeans")


def _sae(layer: str, features: Tensor, count: int, seed: int, steps: int = 1000, batch: int = 1024) -> Concepts:
    """Train a sparse autoencoder with unit decoder rows to reconstruct features from their strongest concepts."""
    generator = torch.Generator().manual_seed(seed)
    start = F.normalize(features[torch.randperm(len(features), generator=generator)[:count]].float(), dim=1)
    decoder, encoder = (nn.Parameter(start.clone()) for _ in range(2))
    active, optimizer = max(1, count // 8), torch.optim.Adam([decoder, encoder], 3e-3)
    scale = features.float().norm(dim=1).mean()
    for _ in tqdm(range(steps), "sparse autoencoder", leave=False, disable=None):
        picked = torch.randint(len(features), (batch,), generator=generator)
        x = (features[picked].float() / scale).T[None]
        concepts = Concepts(layer, F.normalize(decoder, dim=1), encoder, "top", active)
        loss = (concepts.decode(concepts.encode(x)) - x).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = F.normalize(decoder.detach(), dim=1).to(features)
    return Concepts(layer, rows, encoder.detach().to(features), "top", active, "sae")


def _channels(layer: str, features: Tensor, count: int, seed: int) -> Concepts:
    return Concepts.of_channels(layer, features.shape[1])


def _needing_sklearn(method: Callable[..., Concepts]) -> Callable[..., Concepts]:
    def learn(*args: object) -> Concepts:
        try:
            return method(*args)
        except ImportError as error:
            raise InputError("NMF and clusters need scikit-learn: pip install 'timm_bcos[concepts]'") from error

    return learn


METHODS: dict[str, Callable[..., Concepts]] = dict(
    nmf=_needing_sklearn(_nmf), kmeans=_needing_sklearn(_kmeans), sae=_sae, channels=_channels
)
