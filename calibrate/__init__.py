"""Calibration: measuring machines and models, and making the tiny checkpoints that ship with HelioSim."""
