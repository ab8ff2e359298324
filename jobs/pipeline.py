"""Run all stages in one job, from a catalogue to a challenger (settings: askew.pipeline.PipelineSettings)."""

from askew import config
from askew.pipeline import PipelineSettings, run

if __name__ == "__main__":
    config.main(PipelineSettings, run, __doc__ or "")
