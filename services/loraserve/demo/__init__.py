"""The demo: a small chat model and four adapters with clearly different styles."""

from loraserve.demo.shipped import DemoAdapter, demo_adapters

__all__ = ["DemoAdapter", "demo_adapters"]
