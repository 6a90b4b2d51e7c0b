"""`python -m lorayard.dispatcher.monitor dashboard|info [OPTION ...]`: RQ's tools on a yard, without pickle.

rq-dashboard and `rq info` read jobs with RQ's default serializer, which unpickles what it finds, whatever their options
say. Here that serializer is JSON before anything is read: no job can run code in them, and they work while workers
are busy.
"""

from __future__ import annotations

import os
import sys

from rq.serializers import DefaultSerializer, JSONSerializer

CAREFUL = ("--json", "--bind", "127.0.0.1", "--disable-delete")
"""Options of rq-dashboard that come first; those of the command line override them. Jobs are cancelled by yard:ctl."""


def main() -> None:
    """Run the tool with its own options; the Redis is that of LORAYARD_REDIS_URL unless they name another."""
    for name in ("dumps", "loads"):
        setattr(DefaultSerializer, name, staticmethod(getattr(JSONSerializer, name)))
    for variable in ("RQ_REDIS_URL", "RQ_DASHBOARD_REDIS_URL"):
        if "LORAYARD_REDIS_URL" in os.environ:
            os.environ.setdefault(variable, os.environ["LORAYARD_REDIS_URL"])
    tool, *options = sys.argv[1:] or [""]
    if tool == "info":
        from rq.cli.cli import main as rq

        rq(["info", "--serializer", "json", *options])
    elif tool == "dashboard":
        _dashboard(options)
    else:
        sys.exit("lorayard: name the tool: python -m lorayard.dispatcher.monitor dashboard|info [OPTION ...]")


def _dashboard(options: list[str]) -> None:
    try:
        from rq_dashboard.cli import run
    except ModuleNotFoundError as error:
        sys.exit(f"lorayard: this needs the package {error.name}: pip install 'lorayard[monitor]'")
    run([*CAREFUL, *options], auto_envvar_prefix="RQ_DASHBOARD")


if __name__ == "__main__":
    main()
