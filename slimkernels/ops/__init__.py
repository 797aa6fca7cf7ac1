"""The operators: one module each, readable top-down."""
