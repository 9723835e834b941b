"""HelioSim: plan and run early-exit LLM serving, simulated and live with the same controller.

Importing this package imports nothing heavy; torch, transformers and SimPy load when a function needs them.
"""

__version__ = "0.1.0"
