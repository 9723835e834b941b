"""`scripts/gpu_check`: one command that measures on a GPU machine what this repository claims or leaves open.

``plan`` says what is measured under which bar, ``runner`` runs it group by group in processes of their own, ``report``
writes what came out. Each of the other modules measures one thing.
"""
