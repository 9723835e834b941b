"""The paper's numbers, computed again: one declared row per claim of the HELIOS paper (arXiv 2504.10724).

``rows.py`` says what a row is, ``inputs.py`` what it may rest on, ``paper.py`` what the paper says. No module that
computes imports ``paper``: only ``report.py`` and its tests see both.
"""
