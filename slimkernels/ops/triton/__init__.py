"""The Triton kernels, one module per op, named like it; modules with a leading underscore are shared by several."""
