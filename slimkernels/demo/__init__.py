"""The demonstration: half of a real model's layers learn back from the whole model's largest logits, three ways."""

from slimkernels.demo.demo import run_demo
from slimkernels.demo.settings import DemoSettings

__all__ = ["DemoSettings", "run_demo"]
