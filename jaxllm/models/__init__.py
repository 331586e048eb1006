"""Model families, one file each, built from `layers.py` and `decoder.py`; `registry.py` lists them."""
