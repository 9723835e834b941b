"""Behaviour without weights: exit models from published figures, and tables of measured exits.

``spec`` is the file a user writes; ``family`` the distribution of a token's deciding score by depth; ``solve`` turns
figures (shares by exit, a conditional between two models, a perplexity) into parameters; ``draw`` makes the profile's
behaviour table; ``exits`` reads exits that others measured; ``check`` predicts them between thresholds. Needs numpy and
scipy, no SimPy, no torch. Whatever comes from here is synthetic, and says so.
"""
