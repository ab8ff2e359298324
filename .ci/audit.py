"""Ask OSV for the known weaknesses of pinned versions, by pip-audit, and tell honestly when it cannot be asked.

A question whose answer is known comes first: where nobody answers, or a mirror that knows of no weaknesses does, a
line says that nothing was audited, and the exit code is 0, or 1 with `--strict`. Once it is answered, pip-audit
decides, and whatever goes wrong in it is a failure. Nothing is tried again.
"""

import argparse
import subprocess
import sys

import httpx

OSV = "https://api.osv.dev/v1/query"
KNOWN = {"package": {"name": "jinja2", "ecosystem": "PyPI"}, "version": "2.4.1"}  # CVE-2019-10906, and others
TIMEOUT_S = 4


def unreachable(osv: str) -> str:
    """Tell why advisories cannot be had; empty when they can."""
    try:
        answer = httpx.post(osv, json=KNOWN, timeout=TIMEOUT_S, follow_redirects=True)
        answer.raise_for_status()
        return "" if answer.json()["vulns"] else "it knows no weakness of a version that has some"
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> int:
    """Audit; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pins", help="a file of NAME==VERSION lines")
    parser.add_argument("--osv", default=OSV, help="where OSV is asked")
    parser.add_argument("--strict", action="store_true", help="fail where advisories are not reachable")
    asked = parser.parse_args()
    if why := unreachable(asked.osv):
        print(
            f"audit: advisories not reachable at {asked.osv}: {asked.pins} is NOT audited ({why})", file=sys.stderr
        )
        return int(asked.strict)
    command = [sys.executable, "-m", "pip_audit", "--strict", "--no-deps", "--disable-pip", "-r", asked.pins]
    command += ["--vulnerability-service", "osv", "--osv-url", asked.osv, "--progress-spinner", "off"]
    return subprocess.run([*command, "--timeout", str(TIMEOUT_S)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
