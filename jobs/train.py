"""Train a model on triplets and register it in MLflow (settings: askew.training.TrainSettings)."""

from askew import config
from askew.training import TrainSettings, train

if __name__ == "__main__":
    config.main(TrainSettings, train, __doc__ or "")
