"""Prepare triplets from a catalogue, its queries and its judgments (settings: askew.triplets.PrepareSettings)."""

from askew import config
from askew.triplets import PrepareSettings, prepare

if __name__ == "__main__":
    config.main(PrepareSettings, prepare, __doc__ or "")
