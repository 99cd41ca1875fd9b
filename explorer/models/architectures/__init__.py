"""Plain definitions of well-known networks with random weights, written from the papers: for tests, benchmarks and lessons.

They need no other package, and their parameter counts are those published.
"""

from __future__ import annotations

from explorer.models.architectures.bert import BertEncoder, bert_base_encoder
from explorer.models.architectures.fashion import FashionResNet
from explorer.models.architectures.mobilenet import MobileNetV2, mobilenet_v2
from explorer.models.architectures.mobilenet_v1 import MobileNetV1, mobilenet_v1
from explorer.models.architectures.resnet import ResNet, resnet18, resnet50
from explorer.models.architectures.transformer import EncoderClassifier
from explorer.models.architectures.vgg import VGG, vgg11

__all__ = [
    "VGG",
    "BertEncoder",
    "EncoderClassifier",
    "FashionResNet",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet",
    "bert_base_encoder",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "vgg11",
]
