"""Hooks: what MLflow's webhooks send when an alias is moved, and how it is known to come from MLflow.

Knows nothing of HTTP, or of what becomes of it.
"""

import base64
import hashlib
import hmac
import time
from collections.abc import Mapping

SECRET = "ASKEW_WEBHOOK_SECRET"  # noqa: S105  # the environment's name for it, at the endpoint
NAME = "askew"  # of the webhook in MLflow, before the endpoint's
EVENTS = ("model_version_alias.created", "model_version_alias.deleted")
ID, AT, SIGNATURE = "x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"
OLD_S = 300  # what was signed so long ago is not believed


def authentic(secret: str, headers: Mapping[str, str], body: bytes) -> bool:
    """Tell whether a request was signed with the secret, and lately; by HMAC-SHA256, as MLflow does."""
    at = headers.get(AT, "")
    if not secret or not at.isascii() or not at.isdigit() or abs(time.time() - int(at[:12])) > OLD_S:
        return False
    signed = f"{headers.get(ID, '')}.{at}.".encode("latin-1") + body
    digest = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    wanted = b"v1," + base64.b64encode(digest)
    return hmac.compare_digest(headers.get(SIGNATURE, "").encode("latin-1"), wanted)
