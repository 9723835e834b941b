"""The tiny early-exit checkpoints that ship with HelioSim: tokenizer, backbones, exit heads, measured premises.

`python -m calibrate.tiny all` makes them from nothing but the standard library's own text and generated tasks.
"""
