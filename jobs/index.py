"""Build the FAISS index of a registered model version (settings: askew.indexing.IndexSettings)."""

from askew import config
from askew.indexing import IndexSettings, index

if __name__ == "__main__":
    config.main(IndexSettings, index, __doc__ or "")
