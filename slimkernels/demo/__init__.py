"""The demonstration: a real teacher writes, is captured, and teaches one small student three ways."""

from slimkernels.demo.demo import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
