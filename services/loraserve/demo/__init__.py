"""The demo: a small chat model and four adapters whose styles a person tells apart at a glance."""

from loraserve.demo.shipped import DemoAdapter, demo_adapters

__all__ = ["DemoAdapter", "demo_adapters"]
