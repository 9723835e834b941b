"""Operator times that others measured on a GPU, read from their tables and made into a profile's step costs."""
