"""Attention backends of the fast engine behind one small interface (``base``); ``choose`` picks one."""
