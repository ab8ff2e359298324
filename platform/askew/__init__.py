"""askew: train and serve multimodal product search on Ray (query: text; product: text and image)."""

__version__ = "0.1.0"
