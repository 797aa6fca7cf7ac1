"""The Triton kernels: one module per op, with its name; modules with a leading underscore are shared by several."""
