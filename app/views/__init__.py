"""One page a module, each with a function ``page()`` that draws it. ``app/main.py`` lists them."""
