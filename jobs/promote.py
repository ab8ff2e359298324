"""Move the alias of the served version (settings: askew.promotion.PromoteSettings)."""

from askew import config
from askew.promotion import PromoteSettings, promote

if __name__ == "__main__":
    config.main(PromoteSettings, promote, __doc__ or "")
