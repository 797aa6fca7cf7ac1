"""The demonstration: a real teacher writes text, its logits are stored, and one small student learns three ways."""

from slimkernels.demo.demo import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
