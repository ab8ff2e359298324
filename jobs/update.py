"""Change the live index of a registered model version (settings: askew.updating.UpdateSettings)."""

from askew import config
from askew.updating import UpdateSettings, update

if __name__ == "__main__":
    config.main(UpdateSettings, update, __doc__ or "")
