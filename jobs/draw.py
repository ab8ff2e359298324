"""Draw the demo's own catalogue (settings: askew.catalogue.DrawSettings)."""

from askew import config
from askew.catalogue import DrawSettings, draw

if __name__ == "__main__":
    config.main(DrawSettings, draw, __doc__ or "")
