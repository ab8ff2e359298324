"""Evaluate a registered model on judged queries (settings: askew.evaluation.EvaluateSettings)."""

from askew import config
from askew.evaluation import EvaluateSettings, evaluate

if __name__ == "__main__":
    config.main(EvaluateSettings, evaluate, __doc__ or "")
