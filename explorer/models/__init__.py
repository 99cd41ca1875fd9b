"""Brings a model in and says what can be pruned in it.

Invariant: looking changes nothing; the module that comes in is the module that goes on, with its weights as they were.
"""

from __future__ import annotations

from explorer.models.channels import ChannelGroup, channel_groups
from explorer.models.layers import PrunableLayer, prunable_layers
from explorer.models.load import LoadedModel, load_model

__all__ = ["ChannelGroup", "LoadedModel", "PrunableLayer", "channel_groups", "load_model", "prunable_layers"]
