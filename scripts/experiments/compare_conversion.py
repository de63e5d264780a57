"""Classify a labeled data set with a plain timm model and with its function-preserving B-cos conversion.

Prints the top-1 accuracy of both, on how many images their predictions agree, and the largest relative difference of
their logits.
"""

import argparse

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_bcos
from timm_bcos.weights.readers import read_state_dict


def loader(model: torch.nn.Module, args: argparse.Namespace) -> DataLoader:
    dataset = create_dataset("", root=args.data, class_map=args.class_map)
    dataset.transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return DataLoader(dataset, batch_size=args.batch_size)


@torch.no_grad()
def logits_and_labels(
    model: torch.nn.Module, args: argparse.Namespace, title: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [(model(x), y) for x, y in tqdm(loader(model, args), desc=title)]
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def main(args: argparse.Namespace) -> None:
    plain = timm.create_model(args.arch, pretrained=args.checkpoint is None).eval()
    if args.checkpoint:
        plain.load_state_dict(read_state_dict(args.checkpoint))
    expected, labels = logits_and_labels(plain, args, "plain")
    converted = timm_bcos.bcosify(plain, timm_bcos.BcosConfig.finetune(b=1, bias=True))
    logits, _ = logits_and_labels(converted, args, "converted")
    same = (logits.argmax(1) == expected.argmax(1)).sum().item()
    difference = ((logits - expected).abs().amax(1) / expected.abs().amax(1)).max().item()
    for name, values in (("plain", expected), ("converted", logits)):
        correct = (values.argmax(1) == labels).sum().item()
        print(f"{name:<10} top-1 {100 * correct / len(labels):.1f} % ({correct} of {len(labels)})")
    print(
        f"predictions agree on {same} of {len(labels)} images; largest relative difference of logits {difference:.1e}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", help="timm architecture")
    parser.add_argument("data", help="folder or tar that timm's create_dataset reads")
    parser.add_argument("--class-map", default="", help="file with a class name a line, in index order")
    parser.add_argument("--checkpoint", help="weights of the plain model; without it timm downloads its own")
    parser.add_argument("--batch-size", type=int, default=32)
    main(parser.parse_args())
